"""Steps down a loss that both kinds of tuning take, sizes that fall to zero, and a state that can be written and read.

Problem: gradients pass `round` unseen, so codes near a boundary flip back and forth; each flip of a code costs half its curvature in the
loss, and of all codes together that is more than what the steps win as long as they are large. Adam moves every code by the same distance
whatever it costs. Here a code moves along the natural gradient with a diagonal Fisher,

    V <- V - s (1 - t / T)^3 c g_mean / max(size, least)^2,    size = sqrt(E[g^2]),    least = LEAST * mean size,

so that codes that matter little are tried out in long steps and those that matter much in short ones; `c` makes `s` the average distance
of a code whose gradients have a constant sign. `s` and what it falls by: a cube leaves more of the time for small steps than a line. Large
steps leave the good start and fit the text: with 115k tokens 1e-2 is best on a model of 0.2M weights, 2e-3 on one of 3.4M where part of the
text is new at each step (`docs/log.md`, 12 to 14, 18), and `code_step` goes through these. Scales and other parameters take Adam's steps.

A code that still changes often in the second half of the steps has its best value between two codes, and small steps alone do not choose
one of them in time. It is stopped at the one where it has been most, those that change most often first, and the others go on and make up
for it, as in feedback.

Cost: some forty elementwise operations a parameter; memory: two moments, 8 bytes for each, beside the parameter and its gradient, 7 more
for each code and 4 for each parameter in 16 bits. References: Amari 1998 (natural gradient), Adam (Kingma and Ba 2015, arXiv 1412.6980),
stopping what oscillates: Nagel et al. 2022 (arXiv 2203.11086).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from roundel.tuning.sharded import gradient_of, local, own_part, summed, whole
from roundel.tuning.trained import Trained

__all__ = ["SCALE_STEP", "Steps", "places", "shuffled"]

SMALLEST, LARGEST = 3e-4, 1e-2
"""First step of latent codes, in units of the distance of two codes."""

NEW_TEXT = 2e-3
"""The smallest one where no step sees the same text (`teacher`)."""

PER_TOKEN = 0.03
"""First step of latent codes for each token of text per weight."""

SCALE_STEP = 2e-3
"""First step of scales, vectors and other parameters, in units of their root mean square."""

DECAYS = (0.9, 0.99)
"""Of the running means of gradients and of their squares."""

LEAST = 0.01
"""The least size of a code's gradients that counts, as a part of the mean of all."""

TINY = 1e-12
"""Added to the size of gradients, so that nothing is divided by 0."""

FROZEN_FROM, OFTEN, SELDOM = 0.5, 0.1, 0.01
"""After what part of the steps codes that change too often are stopped; how often is too often then, and at the end."""

RECENT = 16.0
"""Weight of a step in the running means of codes, in parts of all steps."""


class Steps:
    """The optimiser of some linears, and of other parameters that move with them."""

    def __init__(self, linears: Iterable[Trained], others: Sequence[Tensor], total: int, *, tokens: int, new_text: bool = False) -> None:
        """Of `total` steps on `tokens` tokens of text, of which each step sees another version if `new_text`."""
        self.linears, self.total, self.taken = list(linears), total, 0
        codes = [parameter for linear in self.linears for parameter in linear.codes]
        self.held: list[Tensor] = [*codes, *(scale for linear in self.linears for scale in linear.scales), *others]
        """What the model has, and its gradients; of several processes each has some rows (`sharded`), and so of everything else here."""
        self.codes = [local(code.detach()) for code in codes]
        self.parameters = [local(parameter.detach()).float() for parameter in self.held]
        """The same in float32: the same memory, or for parameters in 16 bits, in which a step is lost, a copy that the steps add up in."""
        self.means = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.squares = [torch.zeros_like(parameter) for parameter in self.parameters]
        """Running means of gradients and of their squares."""
        self.flips = [torch.zeros_like(code, dtype=torch.float16) for code in self.codes]
        self.averages = [code.detach().round() for code in self.codes]
        """Running means: of how often a code changes at a step, and of the code."""
        self.frozen = [torch.zeros_like(code, dtype=torch.bool) for code in self.codes]
        self.units = [
            (summed([float(own.square().sum(dtype=torch.float64))], [parameter]) / parameter.numel()) ** 0.5
            for parameter, own in zip(self.held[len(codes) :], self.parameters[len(codes) :], strict=True)
        ]
        """In which what follows the codes moves: the root mean square of each parameter at the start."""
        self.weights = sum(code.numel() for code in codes)
        self.first = code_step(tokens, self.weights, new_text)

    @torch.no_grad()
    def take(self) -> None:
        """One step along the gradients, which are then dropped."""
        left = (1 - self.taken / self.total) ** 3
        self.taken += 1
        for parameter, mean, square in zip(self.held, self.means, self.squares, strict=True):
            found = gradient_of(parameter)
            gradient = torch.zeros_like(mean) if found is None else found.float()
            mean.lerp_(gradient, 1 - DECAYS[0])
            square.mul_(DECAYS[1]).addcmul_(gradient, gradient, value=1 - DECAYS[1])
            parameter.grad = None
        before = [code.round().to(torch.int16) for code in self.codes]
        if self.codes:
            self._move_codes(self.first * left)
        for index, unit in enumerate(self.units, start=len(self.codes)):
            self.parameters[index].addcdiv_(self._mean(index), self._size(index), value=-SCALE_STEP * unit * left)
        self._hand_over()
        for linear in self.linears:
            linear.confine()
        self._freeze(before)

    def _move_codes(self, step: float) -> None:
        indices, held = range(len(self.codes)), self.held[: len(self.codes)]
        least = LEAST * summed([float(self._size(index).sum()) for index in indices], held) / self.weights
        inverse = summed([float(self._size(index).clamp_(min=least).reciprocal_().sum()) for index in indices], held) / self.weights
        for index, code in enumerate(self.codes):
            mean = self._mean(index).masked_fill_(self.frozen[index], 0)
            code.addcdiv_(mean, self._size(index).clamp_(min=least).square_(), value=-step / inverse)

    def _hand_over(self) -> None:
        for parameter, own in zip(self.held, self.parameters, strict=True):
            if parameter.dtype != own.dtype:
                local(parameter).copy_(own)

    def _freeze(self, before: Sequence[Tensor]) -> None:
        """Stops codes that keep on changing, given what they were before this step, where they have been most of the time."""
        recent, done = min(1.0, RECENT / self.total), self.taken / self.total
        for code, was, flips, average, frozen in zip(self.codes, before, self.flips, self.averages, self.frozen, strict=True):
            now = code.round()
            flips.lerp_((now != was).to(flips.dtype), recent)
            average.lerp_(now, recent)
            if done > FROZEN_FROM:
                most = OFTEN * (SELDOM / OFTEN) ** ((done - FROZEN_FROM) / (1 - FROZEN_FROM))
                stop = (flips > most) & ~frozen
                code.copy_(torch.where(stop, average.round(), code))
                frozen.logical_or_(stop)

    def _mean(self, index: int) -> Tensor:
        return self.means[index] / (1 - DECAYS[0] ** self.taken)

    def _size(self, index: int) -> Tensor:
        """Root of the mean square of a parameter's gradients."""
        return (self.squares[index] / (1 - DECAYS[1] ** self.taken)).sqrt_().add_(TINY)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and all that is kept beside them, whole."""
        return {name: whole(tensor.detach(), self._holder(name)) for name, tensor in self._own().items()}

    def _holder(self, name: str) -> Tensor:
        """The parameter whose rows something has."""
        return self.held[int(name.partition(".")[2])]

    def _own(self) -> dict[str, Tensor]:
        kinds = {
            "parameter": self.parameters,
            "mean": self.means,
            "square": self.squares,
            "flips": self.flips,
            "average": self.averages,
            "frozen": self.frozen,
        }
        return {f"{kind}.{index}": tensor for kind, tensors in kinds.items() for index, tensor in enumerate(tensors)}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], taken: int) -> None:
        """Goes on from what `tensors` gave after `taken` steps."""
        self.taken = taken
        for name, own in self._own().items():
            own.copy_(own_part(tensors[name], self._holder(name)))
        self._hand_over()


def code_step(tokens: int, weights: int, new_text: bool) -> float:
    """The first step of latent codes: the less text there is for each weight, the sooner large steps fit it instead of the language."""
    return min(LARGEST, max(NEW_TEXT if new_text else SMALLEST, PER_TOKEN * tokens / max(1, weights)))


def shuffled(count: int, rows: int, step: int, seed: int) -> list[int]:
    """The sequences of a step, counted from 0: `rows` of `count`, without repetition until all have been taken; depends on nothing else."""
    found = places(count, rows, step)
    orders = {
        turn: torch.randperm(count, generator=torch.Generator().manual_seed(seed + 1_000_003 * turn))
        for turn in {turn for turn, _ in found}
    }
    return [int(orders[turn][place]) for turn, place in found]


def places(count: int, rows: int, step: int) -> list[tuple[int, int]]:
    """For each sequence of a step, which time round it is of all `count`, and its place in that round's order; both from 0."""
    return [divmod(index, count) for index in range(step * rows, (step + 1) * rows)]
