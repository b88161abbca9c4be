"""What the quantized model rounds as it runs: inputs of linears, for schemes that say so, and keys and values, for `--kv-cache`.

Where a number is to be stored for it, some calibration sequences go through the original, and the largest of what is rounded is seen.

Cost: a forward pass of `CALIBRATED_ON` sequences, for `nvfp4-a4` and `--kv-cache`; else none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from roundel import processes
from roundel.artifacts.source import Source
from roundel.artifacts.work import Work
from roundel.calibration import Split
from roundel.errors import ModelError
from roundel.grids import parse_scheme
from roundel.grids.inputs import CALIBRATED, Inputs, cache_scale, calibrated_scale, round_inputs, round_to_fp8
from roundel.recipes import Recipe
from roundel.sweeps.cache import attentions, through_cache
from roundel.sweeps.gradients import forward
from roundel.sweeps.layers import decoder_layers
from roundel.types import RoundedWeight

__all__ = ["RoundedInputs", "check_cache"]

CALIBRATED_ON = 16
"""Sequences."""


class RoundedInputs:
    """Of a model, by the schemes of its linears; from when it is made the model's layers know of them (`Layers.inputs`, `cache`)."""

    def __init__(self, source: Source, schemes: Mapping[str, str], split: Split, *, keeps_fp8: bool, batch_size: int, work: Work) -> None:
        """Finds the numbers; `keeps_fp8`: whether keys and values are kept in e4m3fn.

        Raises:
            ModelError: as `check_cache`, or an attention has keys that no cache sees.
        """
        kinds: dict[str, Inputs] = {name: kind for name, scheme in schemes.items() if (kind := parse_scheme(scheme).inputs) is not None}
        linears = {name: source.linears[name] for name, kind in kinds.items() if kind == "nvfp4"}
        cached = _attentions(source.model) if keeps_fp8 else {}
        largest: dict[str, float] = {}
        if linears or cached:
            largest = processes.from_first(lambda: _largest(source, linears, cached, split, batch_size, work))
        self._scales = {name: calibrated_scale(largest[name]) for name in linears}
        self.cache = {name: (cache_scale(largest[f"{name} keys"]), cache_scale(largest[f"{name} values"])) for name in cached}
        """Scales of keys and values, by attention."""
        source.layers.inputs = {
            name: partial(round_inputs, kind=kind, calibrated=self._scales.get(name, 1.0)) for name, kind in kinds.items()
        }
        source.layers.cache = {name: partial(_kept, scales) for name, scales in self.cache.items()}

    def stored_with(self, name: str, weight: RoundedWeight) -> RoundedWeight:
        """A linear's codes with what is stored of its inputs, if anything is."""
        scale = self._scales.get(name)
        return weight if scale is None else replace(weight, scales={**weight.scales, CALIBRATED: torch.full((1, 1), scale)})


def check_cache(recipe: Recipe, source: Source) -> None:
    """Refuses to keep keys and values in e4m3fn where that cannot be, before the work.

    Raises:
        ModelError: the model has no attention whose keys and values could be.
    """
    if recipe.kv_cache != "none":
        _attentions(source.model)


def _attentions(model: PreTrainedModel) -> dict[str, nn.Module]:
    prefixes = tuple(f"{name}." for name in decoder_layers(model))
    found = {name: module for name, module in attentions(model).items() if name.startswith(prefixes)}
    if not found or hasattr(model.config.get_text_config(), "kv_lora_rank"):
        raise ModelError("--kv-cache fp8: no attention of this model makes keys and values that engines would keep in fp8 with a scale")
    return found


def _kept(scales: tuple[float, float], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return round_to_fp8(keys, scales[0]), round_to_fp8(values, scales[1])


def _largest(
    source: Source, linears: Mapping[str, nn.Module], cached: Mapping[str, nn.Module], split: Split, batch_size: int, work: Work
) -> dict[str, float]:
    """The size of the largest input of each linear, key and value of each attention; 0 where none came."""
    found = dict.fromkeys([*linears, *(f"{name} {part}" for name in cached for part in ("keys", "values"))], 0.0)

    def see(name: str, values: Tensor) -> None:
        if values.numel():
            found[name] = max(found[name], values.abs().amax().item())

    def reads(name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        see(name, args[0])

    def keeps(name: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        see(f"{name} keys", keys)
        see(f"{name} values", values)
        return keys, values

    hooks = [module.register_forward_pre_hook(partial(reads, name)) for name, module in linears.items()]
    store = work.passing("inputs")
    try:
        with through_cache(cached, keeps):
            for states in forward(source.layers, split.calibration[:CALIBRATED_ON], batch_size=batch_size, store=store):
                store.drop(states)
    finally:
        for hook in hooks:
            hook.remove()
    silent = [name for name in cached if not found[f"{name} keys"]]
    if silent:
        raise ModelError(f"--kv-cache fp8: {silent[0]} hands no keys to a cache")
    return found
