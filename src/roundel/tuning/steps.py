"""Steps down a loss that both kinds of tuning take: Adam, sizes that fall to zero, and a state that can be written and read.

Latent codes and scales have steps of their own size, `step (1 - t / T)^3`: with gradients that pass `round` unseen, codes near a boundary
flip back and forth as long as steps are large, and the loss falls when these get small; a cube leaves more of the time for that than a
line. Large steps leave the good start and fit the text: with 115k tokens 1e-2 is best on a model of 0.2M weights, 1e-3 on one of 3.4M,
larger ones where part of the text is new at each step (`docs/log.md`, 12 to 14), and `code_step` goes through these. Adam divides by the
size of each gradient, so a step moves every code by the same distance whatever its weight in the loss.

Memory: two moments, 8 bytes for each parameter, beside the parameter and its gradient. Reference: Adam (Kingma and Ba 2015, arXiv
1412.6980), in torch's implementation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from roundel.tuning.trained import Trained

__all__ = ["SCALE_STEP", "Steps", "places", "shuffled"]

SMALLEST, LARGEST = 3e-4, 1e-2
"""First step of latent codes, in units of the distance of two codes."""

NEW_TEXT = 2e-3
"""The smallest one where no step sees the same text (`teacher`)."""

PER_TOKEN = 0.03
"""First step of latent codes for each token of text per weight."""

SCALE_STEP = 2e-3
"""First step of scales, vectors and norms, in units of themselves."""

BETAS = (0.9, 0.95)


class Steps:
    """The optimiser of some linears, and of other parameters that move with them."""

    def __init__(self, linears: Iterable[Trained], others: Sequence[Tensor], total: int, *, tokens: int, new_text: bool = False) -> None:
        """Of `total` steps on `tokens` tokens of text, of which each step sees another version if `new_text`."""
        self.linears, self.total, self.taken = list(linears), total, 0
        codes = [parameter for linear in self.linears for parameter in linear.codes]
        scales = [parameter for linear in self.linears for parameter in linear.scales]
        self.parameters: list[Tensor] = [*codes, *scales, *others]
        groups = [
            {"params": codes, "first": code_step(tokens, sum(parameter.numel() for parameter in codes), new_text)},
            {"params": [*scales, *others], "first": SCALE_STEP},
        ]
        self.adam = torch.optim.Adam([group for group in groups if group["params"]], betas=BETAS, eps=1e-12)

    def take(self) -> None:
        """One step along the gradients, which are then dropped."""
        left = 1 - self.taken / self.total
        for group in self.adam.param_groups:
            group["lr"] = group["first"] * left**3
        self.adam.step()
        self.adam.zero_grad()
        for linear in self.linears:
            linear.confine()
        self.taken += 1

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and moments."""
        found = {f"parameter.{index}": parameter.detach() for index, parameter in enumerate(self.parameters)}
        for index, parameter in enumerate(self.parameters):
            for name, value in self.adam.state[parameter].items():
                found[f"{name}.{index}"] = value
        return found

    def restore(self, tensors: Mapping[str, Tensor], taken: int) -> None:
        """Goes on from what `tensors` gave after `taken` steps."""
        self.taken = taken
        for index, parameter in enumerate(self.parameters):
            parameter.data.copy_(tensors[f"parameter.{index}"])
            for name in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors[f"{name}.{index}"]
                self.adam.state[parameter][name] = value.clone() if name == "step" else value.to(parameter.device, copy=True)


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
