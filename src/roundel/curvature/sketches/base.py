"""What every estimator and every sketch can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from roundel.types import Factors, KroneckerFactors, LayerGrad

__all__ = ["Candidate", "Estimator", "Sketch", "aligned"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Factors to round one linear with, and by what the recipe's damping is multiplied."""

    factors: Factors
    damping: float = 1.0


def aligned(batch: Tensor, sequence: int) -> Tensor:
    """One sequence in float32, in memory of its own: on some machines `x x^T` rounds differently at an address that is not aligned."""
    return batch[sequence].to(torch.float32, copy=True)


class Sketch(ABC):
    """Running sums over the sequences that one linear has seen in one pass.

    Matrices are summed in float32, sequence by sequence in order, so that they do not depend on the batch size. Two
    sketches of different sequences merge by addition.
    """

    def __init__(self, d_out: int, d_in: int, device: torch.device, index: int = 0) -> None:
        self.d_out, self.d_in, self.device, self.index = d_out, d_in, device, index
        self.sums: dict[str, Tensor] = {}
        self.tokens = 0
        """Of text."""
        self.rows = 0
        """That the linear has seen of them; not the same where it is an expert's. One a sequence where no gradient came back."""

    def start(self, **sizes: int) -> None:
        """Starts sums of `(size, size)` matrices, by name, and the sum `trace`."""
        for name, size in sizes.items():
            self.sums[name] = torch.zeros(size, size, dtype=torch.float32, device=self.device)
        self.sums["trace"] = torch.zeros((), dtype=torch.float64, device=self.device)

    def prepare(self) -> None:  # noqa: B027
        """Called once before the first sequence: what takes much memory for a moment is made here."""

    def update(self, grad: LayerGrad) -> None:
        """Adds one batch."""
        for sequence in grad.sequences():
            if grad.g.shape[1]:
                self.add_sequence(grad, sequence)
            self.tokens += grad.tokens
            self.rows += grad.g.shape[1] + grad.blind

    @abstractmethod
    def add_sequence(self, grad: LayerGrad, sequence: int) -> None:
        """Adds one sequence of the batch."""

    def finish(self) -> None:  # noqa: B027
        """Called once when this process has seen all its sequences of the pass, before sums of other processes are added."""

    def pending(self) -> int:
        """Sequences of a batch that is not complete, as long as it is not finished: there are no factors then."""
        return 0

    @abstractmethod
    def factors(self) -> Factors:
        """The factors of all sequences seen so far; what a later pass is to go on from must be `KroneckerFactors`."""

    def merge(self, other: Sketch) -> None:
        """Adds the sums of a sketch of other sequences.

        Raises:
            ValueError: the other sketch holds other sums, or those of another pass.
        """
        if type(self) is not type(other) or (self.d_out, self.d_in) != (other.d_out, other.d_in):
            raise ValueError(f"cannot merge {type(other).__name__} into {type(self).__name__} of {self.d_out} x {self.d_in}")
        if self.index != other.index:
            raise ValueError(f"cannot merge a sketch of pass {other.index} into one of pass {self.index}")
        for name, total in self.sums.items():
            total.add_(other.sums[name])
        self.tokens += other.tokens
        self.rows += other.rows

    def add_token_trace(self, grad: LayerGrad, sequence: int) -> None:
        """Adds `sum_t |g_t|^2 |x_t|^2` to the sum `trace`: the Fisher's trace without its cross-token terms."""
        norms = torch.linalg.vector_norm(grad.g[sequence], dim=-1, dtype=torch.float32)
        self.sums["trace"] += (norms * grad.input.norms(sequence)).double().square().sum()

    def total_trace(self) -> Tensor:
        """Trace of the Fisher of the whole weight, summed over all tokens."""
        return self.sums["trace"]

    def normalised(self, H_out: Tensor, H_in: Tensor) -> KroneckerFactors:
        """Factors proportional to these, with their absolute scale in nats per token."""
        return KroneckerFactors.normalised(H_out, H_in, trace=self.total_trace().item() / max(self.tokens, 1))


class Estimator(ABC):
    """Settings of an estimator; subclasses are frozen dataclasses."""

    @property
    def passes(self) -> int:
        """How often the data is gone over, with the same labels."""
        return 1

    @property
    def together(self) -> int:
        """So many consecutive sequences belong together: they are never split over processes."""
        return 1

    @property
    def row_groups(self) -> int:
        """How many groups of rows get factors of their own."""
        return 1

    def pilot(self, sequences: int) -> int:
        """How many of the first of so many sequences make pass 0, and no later pass; 0: every pass goes over all sequences."""
        return 0

    def held_out(self, sequences: int) -> int:
        """How many of so many sequences are left out of the sums, to choose between `candidates` by."""
        return 0

    def candidates(self, sketch: Sketch) -> dict[str, Candidate]:
        """Factors to choose from, by name, the preferred ones first."""
        return {"": Candidate(factors=sketch.factors())}

    def converged(self, sketch: Sketch) -> bool:
        """Whether later passes would leave this sketch's factors as they are."""
        return False

    @abstractmethod
    def sketch(self, d_out: int, d_in: int, device: torch.device, *, index: int = 0, previous: KroneckerFactors | None = None) -> Sketch:
        """An empty sketch for pass `index`; `previous` are the factors of the pass before."""
