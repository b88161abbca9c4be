"""How the quantized model rounds what its linears read, for schemes that say so (`grids.inputs`).

Where a number for each linear is to be stored, some calibration sequences go through the original, and the largest input of each is seen.

Cost: a forward pass of `CALIBRATED_ON` sequences for `nvfp4-a4`; else none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from roundel import processes
from roundel.artifacts.source import Source
from roundel.artifacts.work import Work
from roundel.calibration import Split
from roundel.grids import parse_scheme
from roundel.grids.inputs import CALIBRATED, Inputs, calibrated_scale, round_inputs
from roundel.sweeps.gradients import forward
from roundel.types import RoundedWeight

__all__ = ["RoundedInputs"]

CALIBRATED_ON = 16
"""Sequences."""


class RoundedInputs:
    """Of the linears of a model, by their schemes; from when it is made the model's layers know of them (`Layers.inputs`)."""

    def __init__(self, source: Source, schemes: Mapping[str, str], split: Split, *, batch_size: int, work: Work) -> None:
        kinds: dict[str, Inputs] = {name: kind for name, scheme in schemes.items() if (kind := parse_scheme(scheme).inputs) is not None}
        stored = {name: source.linears[name] for name, kind in kinds.items() if kind == "nvfp4"}
        self._scales: dict[str, float] = {}
        if stored:
            largest = processes.from_first(lambda: _largest(source, stored, split, batch_size, work))
            self._scales = {name: torch.tensor(calibrated_scale(size)).item() for name, size in largest.items()}
        source.layers.inputs = {
            name: partial(round_inputs, kind=kind, calibrated=self._scales.get(name, 1.0)) for name, kind in kinds.items()
        }

    def stored_with(self, name: str, weight: RoundedWeight) -> RoundedWeight:
        """A linear's codes with what is stored of its inputs, if anything is."""
        scale = self._scales.get(name)
        return weight if scale is None else replace(weight, scales={**weight.scales, CALIBRATED: torch.full((1, 1), scale)})


def _largest(source: Source, linears: Mapping[str, nn.Module], split: Split, batch_size: int, work: Work) -> dict[str, float]:
    """The size of the largest input of each; 0 where none came."""
    found = dict.fromkeys(linears, 0.0)

    def see(name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        if args[0].numel():
            found[name] = max(found[name], args[0].abs().amax().item())

    hooks = [module.register_forward_pre_hook(partial(see, name)) for name, module in linears.items()]
    store = work.passing("inputs")
    try:
        for states in forward(source.layers, split.calibration[:CALIBRATED_ON], batch_size=batch_size, store=store):
            store.drop(states)
    finally:
        for hook in hooks:
            hook.remove()
    return found
