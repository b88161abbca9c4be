"""From rounded weights to a checkpoint in the recipe's format, one shard at a time (`artifacts.checkpoints`)."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from roundel.artifacts.checkpoints import CACHE_SCALES, Frame, write
from roundel.artifacts.source import Source
from roundel.formats import gguf
from roundel.grids import parse_scheme
from roundel.models.linears import matrix_modules
from roundel.recipes import Recipe
from roundel.stages.linears import stored_bits
from roundel.stages.notes import Notes
from roundel.stages.rounding import Rounded
from roundel.types import RoundedWeight

__all__ = ["size_without", "write_model"]


def write_model(staging: Path, recipe: Recipe, source: Source, rounded: Rounded, notes: Notes) -> int:
    """Fills a directory, the report aside; returns the bytes of all tensors."""
    with notes.timed("writing"), notes.progress.stage("writing", len(source.checkpoint.files)) as advance:
        frame = _frame(source, {name: row["dtype"] for name, row in {**rounded.layers, **rounded.ends.rows}.items()}, rounded.others)
        frame = _with_cache(frame, source, rounded.cache)
        weights = ChainMap(dict(rounded.ends.weights), rounded.weights)  # type: ignore[arg-type]
        return write(staging, frame, weights, recipe.written_format(), name=Path(source.name).name, advance=advance)


def size_without(recipe: Recipe, source: Source, names: Collection[str], ends: Mapping[str, str]) -> int:
    """Bytes of the directory's tensors, or of the GGUF file, without the weights of some modules.

    Args:
        recipe: Which format.
        source: The original.
        names: Those that are left out.
        ends: Schemes of embedding and head, where they are rounded and not among these.
    """
    shapes = {name: tuple(source.model.get_parameter(f"{name}.weight").shape) for name in [*names, *ends]}
    frame = _frame(source, dict.fromkeys(shapes, "float32"), {})
    if recipe.written_format() == "gguf":
        schemes = {name: recipe.fitting("q8_0", shape[1]) for name, shape in shapes.items()} | dict(ends)
        empty = torch.empty(0, dtype=torch.int8)
        rounded = {
            name: RoundedWeight(scheme=scheme, codes=empty, scales={}, shape=(shapes[name][0], shapes[name][1]))
            for name, scheme in schemes.items()
        }
        own = sum(parse_scheme(schemes[name]).stored_bits(rounded[name].shape, torch.float16) // 8 for name in names)
        whole = gguf.size(
            model=frame.directory,
            tensors=frame.sizes,
            read=frame.reader,
            rounded=rounded,
            name=Path(source.name).name,
            config=frame.config,
        )
        return whole - own + PADDING * len(names)
    packed = set(frame.weights.values())
    dense = sum(size for tensor, size in frame.sizes.items() if tensor not in packed)
    return dense + sum(
        stored_bits(recipe, parse_scheme(scheme), torch.empty(shapes[name], dtype=torch.float16, device="meta")) // 8
        for name, scheme in ends.items()
    )


PADDING = 32
"""Bytes that a tensor of a GGUF is filled up to."""


def _with_cache(frame: Frame, source: Source, cache: Mapping[str, tuple[float, float]]) -> Frame:
    """The same with the scales of keys and values, under the stored names of their attentions."""
    scales: dict[str, Tensor] = {}
    for name, own in cache.items():
        stored = (source.checkpoint.weight_of(f"{name}.k_proj") or f"{name}.k_proj.weight").removesuffix(".k_proj.weight")
        scales |= {f"{stored}{end}": torch.tensor([scale]) for end, scale in zip(CACHE_SCALES, own, strict=True)}
    if not scales:
        return frame
    return replace(
        frame,
        sizes={**frame.sizes, **dict.fromkeys(scales, 4)},
        reader=lambda tensor: scales[tensor] if tensor in scales else frame.reader(tensor),
        cache=frozenset(scales),
    )


def _frame(source: Source, dtypes: Mapping[str, str], moved: Mapping[str, Tensor]) -> Frame:
    """The original without the weights of its quantized linears, given by their types, and with `moved` for parameters that were tuned;
    experts of whom none is quantized stay one parameter, those of whom some are become tensors of their own."""
    checkpoint = source.checkpoint
    names = {id(source.model.get_parameter(name)): name for name in moved}
    aliases = {  # a tied head may be stored once more
        checkpoint.stored(name): moved[names[id(parameter)]]
        for name, parameter in source.model.named_parameters(remove_duplicate=False)
        if id(parameter) in names
    }
    fused = checkpoint.fused_in(source.model)
    pieces = {piece for stored in fused.values() for piece in stored}
    kinds = {tensor: checkpoint.read(stored[0]).dtype for tensor, stored in fused.items()}
    weights = {name: stored for name in dtypes if (stored := checkpoint.weight_of(name)) is not None}

    def read(tensor: str) -> Tensor:
        if tensor in aliases:
            return aliases[tensor]
        if tensor not in fused:
            values = checkpoint.read(tensor)
            return values.T.contiguous() if tensor in checkpoint.names.turned else values
        return source.model.get_parameter(tensor).detach().cpu().to(kinds[tensor]).contiguous()

    whole: dict[str, list[str]] = {}
    for part, (stored, _) in checkpoint.names.parts.items():
        whole.setdefault(stored, []).append(part)
    sizes: dict[str, int] = {}
    for tensor in checkpoint:
        parts = whole.get(tensor, [])
        if parts:
            sizes |= dict.fromkeys(parts, checkpoint.sizes[tensor] // len(parts))
        elif tensor not in pieces:
            sizes[tensor] = checkpoint.sizes[tensor]
    sizes |= {tensor: source.model.get_parameter(tensor).numel() * kind.itemsize for tensor, kind in kinds.items()}
    return Frame(
        directory=source.path,
        config=source.config,
        sizes=sizes,
        reader=read,
        weights=weights,
        dtypes={name: getattr(torch, dtypes[name]) for name in weights},
        turned=frozenset(name for name, tensor in weights.items() if tensor in checkpoint.names.turned),
        linears=matrix_modules(source.model),
    )
