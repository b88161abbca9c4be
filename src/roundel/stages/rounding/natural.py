"""A few steps of the whole model downhill in the KL, at a few places of the rounding sweep, for what is not rounded yet.

Problem: prefix-aware targets make each linear's output what it was, as a regression on its own inputs. They do not know what the KL is
blind to, nor that one linear can make up for another. So at a few places of the depth, two whatever it is, all linears that are left, still
real numbers, take some steps along the natural gradient of the KL as it is with the rounded prefix:

    G = d KL(original || model) / dW,    N = (H_out + d I)^-1 G (H_in + d I)^-1 / scale,    W -= c N,    c = <G, N> / <N, F N>

each on some `STEP_TOKENS` tokens that go along both paths, others at each step. `F` is the exact Fisher of all these weights together, of
which one product is a difference of logits, so no length has to be chosen; the part of it that is taken falls to 0. Then the KL is measured
on sequences that the steps have not seen; if it has not fallen, the weights stay what they were. From there on the moved weights are the
original that targets are relative to, and its path begins at the quantized one.

Cost, for each step: two forward passes and one backward pass through the layers that are left, logits of three hidden states, and a
Cholesky factor of each curvature. Memory: weights of what is left twice more, in files where the model is not in memory.

References: Martens and Grosse 2015 (K-FAC, arXiv 1503.05671), section 6.4 for the length; ResComp (arXiv 2604.07955) is a relative. The
same after every layer, as it was before, costs the square of the depth (`docs/log.md`, 20).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from roundel.evaluate import Comparison
from roundel.linalg.fast import fast, fast_products
from roundel.recipes import STEP_TOKENS
from roundel.store import storage
from roundel.sweeps import HiddenStates, Layers
from roundel.sweeps.gradients import batches
from roundel.sweeps.tap import tapped
from roundel.types import Factors, LayerGrad, TokenBatch

__all__ = ["NaturalSteps", "places"]

DAMPING = 0.3
"""Of the factors that a gradient is divided by, relative to their mean diagonal: batches are small."""
NUDGE = 1e-2
"""Size of the change that differences of logits are taken over, relative to the weights."""
JUDGES = 8
"""One sequence in so many is kept to judge the steps by."""


def places(groups: int, count: int) -> list[int]:
    """Before which of so many groups of layers the steps are taken, at `count` places spread over them evenly."""
    return sorted({round(groups * place / (count + 1)) for place in range(1, count + 1)} - {0, groups})


@dataclass(frozen=True, kw_only=True)
class NaturalSteps:
    """What the steps need of a model."""

    layers: Layers
    linears: Mapping[str, nn.Linear]
    factors: Callable[[int], Mapping[str, Factors]]
    """Of the linears of a group."""
    tokens: TokenBatch
    """That go along both paths."""
    reference: HiddenStates
    """The original's hidden states of these after the last layer."""
    steps: int
    """How many at each place."""
    seed: int
    """Of the order of the sequences."""
    batch_size: int
    """Sequences together where nothing is trained."""
    directory: Path | None
    """For weights that are not in memory with the model; None: all is."""

    def move(self, first: int, start: HiddenStates) -> dict[str, Any]:
        """Moves the linears from group `first` on, given the quantized path's states before it.

        Returns:
            `held_out_kl` before and after, in nats per token, and whether the moved weights were `taken`; for the report.
        """
        count = len(self.tokens)
        judges = range(count - max(1, count // JUDGES), count)
        order = _endless(judges.start, max(1, STEP_TOKENS // self.tokens.ids.shape[1]), self.seed)
        before, old = self._kl(first, start, judges), _Tensors(self.directory and self.directory / "before")
        for index in self._groups(first):
            with self.layers.loaded(index):
                old.put(index, {name: self.linears[name].weight.detach().clone() for name in self._names(index)})
        for step in range(self.steps):
            self._step(first, start, next(order), 1 - step / self.steps)
        after = self._kl(first, start, judges)
        if not after < before:
            for index in self._groups(first):
                with self.layers.loaded(index):
                    for name, weight in old.get(index).items():
                        self.linears[name].weight.data.copy_(weight)
                    self.layers.keep(index, self._names(index))
        old.clear()
        return {"before_layer": self.layers.groups[first][0], "held_out_kl": [before, after], "taken": after < before}

    def _names(self, index: int) -> list[str]:
        return self.layers.inside(index, self.linears)

    def _groups(self, first: int) -> range:
        return range(first, len(self.layers))

    def _step(self, first: int, start: HiddenStates, rows: Sequence[int], part: float) -> None:
        """One step of `part` of the best length for these sequences."""
        states, steps = self._forward(first, start, rows), _Tensors(self.directory and self.directory / "steps")
        slope, size, weight = self._gradients(first, states, rows, steps)
        if slope > 0 and size > 0:
            nudge = NUDGE * (weight / size) ** 0.5
            self._add(first, steps, -nudge)
            curvature = self._curvature(states[-1], self._forward(first, start, rows)[-1], rows, nudge)
            self._add(first, steps, nudge - (part * slope / curvature if curvature > 0 else 0.0))
        steps.clear()

    def _add(self, first: int, steps: _Tensors, length: float) -> None:
        for index in self._groups(first):
            with self.layers.loaded(index):
                for name, N in steps.get(index).items():
                    weight = self.linears[name].weight.data
                    weight.add_(N.to(weight.dtype), alpha=length)
                self.layers.keep(index, self._names(index))

    @torch.no_grad()
    def _forward(self, first: int, start: HiddenStates, rows: Sequence[int]) -> list[Tensor]:
        """Hidden states before each group from `first` on, and after the last."""
        ids = self._ids(rows)
        states = [start.read(rows).to(self.layers.device)]
        for index in self._groups(first):
            with self.layers.loaded(index):
                states.append(fast(self.layers.run)(index, ids, states[-1]))
        return states

    def _gradients(self, first: int, states: Sequence[Tensor], rows: Sequence[int], steps: _Tensors) -> tuple[float, float, float]:
        """Puts `N` of each linear that is left into `steps`; returns `<G, N>`, `|N|^2` and `|W|^2` of all."""
        ids, slope, size, weight = self._ids(rows), 0.0, 0.0, 0.0
        g = self._head_gradient(states[-1], rows)
        for index in reversed(self._groups(first)):
            own, found = {name: self.linears[name] for name in self._names(index)}, dict[str, Tensor]()

            def consume(name: str, grad: LayerGrad, found: dict[str, Tensor] = found) -> None:
                with fast_products(grad.g.device):
                    found[name] = grad.g.flatten(0, 1).float().T @ grad.input.x.flatten(0, 1).float()

            with self.layers.loaded(index):
                with tapped(self.layers.model, own, consume, apart=False):
                    x = states[index - first].clone().requires_grad_(True)
                    fast(self.layers.run)(index, ids, x).backward(g)
                weight += sum(float(linear.weight.detach().float().square().sum(dtype=torch.float64)) for linear in own.values())
            factors = self.factors(index) if own else {}
            natural = {name: _natural(G, factors[name]) for name, G in found.items()}
            slope += sum(float((found[name] * N).sum(dtype=torch.float64)) for name, N in natural.items())
            size += sum(float(N.square().sum(dtype=torch.float64)) for N in natural.values())
            steps.put(index, natural)
            assert x.grad is not None
            g = x.grad
        return slope, size, weight

    @torch.no_grad()
    def _head_gradient(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """Of the mean KL over all tokens of these sequences."""
        ids, g = self._ids(rows), torch.empty_like(hidden)
        reference = self.reference.read(rows).to(hidden)
        for row in range(len(rows)):
            for part in self.layers.slices(ids.shape[1]):
                own = ids[row : row + 1, part]
                p = self.layers.logits(own, reference[row : row + 1, part]).float().softmax(-1)
                with torch.enable_grad():
                    leaf = hidden[row : row + 1, part].clone().requires_grad_(True)
                    logits = self.layers.logits(own, leaf)
                    u = (logits.detach().float().softmax(-1) - p) / ids.numel()
                    (g[row : row + 1, part],) = torch.autograd.grad(logits, leaf, u.to(logits.dtype))
        return g

    @torch.no_grad()
    def _curvature(self, hidden: Tensor, nudged: Tensor, rows: Sequence[int], nudge: float) -> float:
        """`<N, F N>` per token, from the hidden states without and with a nudge against `N`."""
        ids, total = self._ids(rows), 0.0
        for row in range(len(rows)):
            for part in self.layers.slices(ids.shape[1]):
                own = ids[row : row + 1, part]
                z = self.layers.logits(own, hidden[row : row + 1, part]).float()
                change = (z - self.layers.logits(own, nudged[row : row + 1, part]).float()) / nudge
                p = z.softmax(-1)
                total += float(((p * change.square()).sum(-1) - (p * change).sum(-1).square()).sum(dtype=torch.float64))
        return total / ids.numel()

    @torch.no_grad()
    def _kl(self, first: int, start: HiddenStates, rows: Sequence[int]) -> float:
        """Of the model as it is, on these sequences."""
        found = Comparison()
        for part in batches(rows, self.batch_size):
            ids, reference = self._ids(part), self.reference.read(part).to(self.layers.device)
            hidden = self._forward(first, start, part)[-1]
            for place, row in enumerate(part):
                ours, theirs = (
                    lambda own, place=place, state=state, ids=ids: self.layers.logits(
                        ids[place : place + 1, own], state[place : place + 1, own]
                    )[0]
                    for state in (hidden, reference)
                )
                found.add(self.tokens.ids[row], ours, theirs, self.layers.slices(ids.shape[1]))
        return found.result().kl_mean

    def _ids(self, rows: Sequence[int]) -> Tensor:
        return self.tokens.ids[list(rows)].to(self.layers.device)


class _Tensors:
    """Tensors of each group by name, in memory or in files."""

    def __init__(self, directory: Path | None) -> None:
        self._directory, self._memory = directory, dict[int, dict[str, Tensor]]()

    def put(self, index: int, tensors: dict[str, Tensor]) -> None:
        if self._directory is None:
            self._memory[index] = tensors
            return
        with storage(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, self._file(index))

    def get(self, index: int) -> dict[str, Tensor]:
        if self._directory is None:
            return self._memory.get(index, {})
        return load_file(self._file(index)) if self._file(index).is_file() else {}

    def clear(self) -> None:
        self._memory.clear()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _file(self, index: int) -> Path:
        assert self._directory is not None
        return self._directory / f"{index:04d}.safetensors"


def _natural(G: Tensor, factors: Factors) -> Tensor:
    """`(H_out + d I)^-1 G (H_in + d I)^-1 / scale`, of each group of rows."""
    found = []
    for rows, group in factors.row_groups():
        L_out, L_in = (torch.linalg.cholesky(H.to(G) + DAMPING * torch.eye(len(H), device=G.device)) for H in (group.H_out, group.H_in))
        found.append(torch.cholesky_solve(torch.cholesky_solve(G[rows], L_out).T.contiguous(), L_in).T / group.scale)
    return torch.cat(found)


def _endless(count: int, rows: int, seed: int) -> Iterator[list[int]]:
    """Batches of `rows` of so many sequences, again and again in new orders."""
    random = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while True:
        while len(order) < rows:
            order += torch.randperm(count, generator=random).tolist()
        yield sorted(order[:rows])
        order = order[rows:]
