"""Codes of single linears, from their weights and factors; and what each takes to store.

A linear whose rows have factors in groups is as many problems as it has groups. Its rotation is drawn by its name and the recipe's seed, so
that it does not depend on what else is rounded. Errors are relative to the stored weight, whatever the rounding's target is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from roundel.artifacts.source import Source
from roundel.errors import SchemeError, in_layer
from roundel.formats import FORMATS, gguf
from roundel.formats.base import FREE
from roundel.grids import Grid, TileGrid
from roundel.recipes import Recipe
from roundel.rotation import Permutation, Rotation
from roundel.rounding import make_problem, round_weights
from roundel.rounding.round import Start, dequantized, stacked
from roundel.types import Factors, KroneckerFactors, RoundedWeight, RoundingProblem

__all__ = ["Linear", "by_decoder_layer", "round_linears", "schemes_of", "stored_bits", "width_of"]


@dataclass(frozen=True, kw_only=True)
class Linear:
    """What is to be rounded of one linear."""

    name: str
    """Seeds its rotation."""
    tensor: str
    """The stored name of its weight."""
    part_of: str | None
    """The stored tensor that it is a part of, an expert's of all."""
    turned: bool
    """Whether it is stored transposed."""
    stored: Tensor
    factors: Factors
    damping: float
    target: Tensor | None = None
    """What it is rounded to, if not to what is stored."""
    start: RoundedWeight | None = None
    """What it is quantized to already: the same scheme and rotation are kept."""

    @classmethod
    def of(cls, source: Source, name: str, **given: Any) -> Linear:
        """A linear of the source, with its weight as it is stored; `given` are the other fields."""
        checkpoint, tensor = source.checkpoint, source.checkpoint.weight_of(name)
        assert tensor is not None
        part_of, turned = checkpoint.part_of(tensor), tensor in checkpoint.names.turned
        return cls(name=name, tensor=tensor, part_of=part_of, turned=turned, stored=checkpoint.read(tensor), **given)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Rows of a linear with factors of their own: one problem."""

    W: Tensor
    """As stored: errors are relative to it, even where the problem has another target."""
    factors: KroneckerFactors
    rotation: Rotation | Permutation | None
    problem: RoundingProblem
    start: Start | None = None


def round_linears(
    recipe: Recipe, grid: Grid, linears: Sequence[Linear], device: torch.device, *, kept: bool = True
) -> list[tuple[RoundedWeight, dict[str, Any]]]:
    """The codes of each, in main memory, and its row of the report; `device` does the work.

    With grids of tiles all are rounded at the same time (`rounding.round_weights`), and the seconds are shared out by size; with grids of
    scalars that would only take memory.
    Where they are not `kept`, as drafts, the recipe's format need not hold them, and the row has no bits.
    """
    if len(linears) > 1 and not isinstance(grid, TileGrid):
        return [round_linears(recipe, grid, [linear], device, kept=kept)[0] for linear in linears]
    began = time.monotonic()
    parts: list[list[_Part]] = []
    for linear in linears:
        with in_layer(linear.name):
            parts.append(_parts(recipe, grid, linear, device))
    flat = [part for own in parts for part in own]
    dtypes = [_scale_dtype(recipe, linear) for linear, own in zip(linears, parts, strict=True) for _ in own]
    starts = [part.start for part in flat]
    found = iter(round_weights([part.problem for part in flat], grid, sweeps=recipe.sweeps, scale_dtypes=dtypes, starts=starts))
    results = []
    for linear, own in zip(linears, parts, strict=True):
        with in_layer(linear.name):
            weight, row = _result(grid, linear, own, [next(found) for _ in own])
            if kept:
                row["bits_per_weight"] = stored_bits(recipe, grid, linear.stored) / linear.stored.numel()
            results.append((weight, row))
    seconds = time.monotonic() - began
    for linear, (_, row) in zip(linears, results, strict=True):
        row["seconds"] = round(seconds * linear.stored.numel() / sum(other.stored.numel() for other in linears), 3)
    return results


def _parts(recipe: Recipe, grid: Grid, linear: Linear, device: torch.device) -> list[_Part]:
    kind = recipe.rotation_of(grid) if linear.start is None else None
    given = None if linear.start is None else linear.start.rotation
    groups = linear.factors.row_groups()
    if (kind or linear.start) and len(groups) > 1:
        raise SchemeError("groups of rows with curvature of their own cannot be rotated together; use --rotate none or another curvature")
    parts = []
    for rows, group in groups:
        factors = KroneckerFactors(H_out=group.H_out.to(device), H_in=group.H_in.to(device), scale=group.scale)
        W, basis = linear.stored[rows].to(device).float(), factors
        rotation = given if isinstance(given, Rotation | Permutation) else None
        if kind:
            digest = hashlib.sha256(f"{recipe.seed} {linear.name}".encode()).digest()
            rotation = Rotation.draw(W.shape[0], W.shape[1], kind=kind, seed=int.from_bytes(digest[:6], "big"))
        if rotation is not None:
            basis = rotation.rotate_factors(factors)
        target = W if linear.target is None else linear.target[rows].to(device)
        problem = make_problem(
            rotation.rotate_weight(target) if rotation else target, basis, damping=linear.damping, ordered=not isinstance(grid, TileGrid)
        )
        parts.append(_Part(W=W, factors=factors, rotation=rotation, problem=problem, start=_start(linear.start, device)))
    return parts


def _start(given: RoundedWeight | None, device: torch.device) -> Start | None:
    """Scales of tensors that an engine may have in common (`nvfp4`), or inside of vectors (EXL3), stay."""
    if given is None:
        return None
    in_vectors = bool(getattr(given.rotation, "has_vectors", False))
    scales = {name: scale.to(device) for name, scale in given.scales.items()}
    return Start(
        codes=given.codes.to(device), scales=scales, searches=not in_vectors and "tensor_scale" not in scales, refits=not in_vectors
    )


def _result(grid: Grid, linear: Linear, parts: Sequence[_Part], found: Sequence[RoundedWeight]) -> tuple[RoundedWeight, dict[str, Any]]:
    weights, proxy_loss = [], 0.0
    for part, weight in zip(parts, found, strict=True):
        restored = dataclasses.replace(weight, rotation=part.rotation, shape=(part.W.shape[0], part.W.shape[1]))
        E = part.W - dequantized(restored)
        proxy_loss += part.factors.loss(E)
        scales = {key: scale.cpu() for key, scale in weight.scales.items()}
        weights.append(dataclasses.replace(restored, codes=weight.codes.cpu(), scales=scales))
    result = stacked(weights)
    row = {
        "tensor": linear.tensor,
        **({} if linear.part_of is None else {"part_of": linear.part_of}),
        **({"turned": True} if linear.turned else {}),
        "shape": list(linear.stored.shape),
        "bits": grid.bits,
        "scheme": grid.name,
        "dtype": str(linear.stored.dtype).removeprefix("torch."),
        "damping": max(part.problem.damping for part in parts),
        "proxy_loss": proxy_loss,
        "sweeps": len(result.trace) - 1,
        "loss_after_sweeps": result.trace[-1] / result.trace[0] if 0 < result.trace[0] < math.inf else 1.0,
    }
    return result, row


def schemes_of(recipe: Recipe, source: Source) -> dict[str, str]:
    """Of each linear, where none is chosen by what it costs: what it has, the recipe's, or its mix's, or what fits in its place."""
    if source.given_schemes:
        return {name: source.given_schemes[name] for name in source.linears}
    widths = {name: width_of(recipe, source, name) for name in source.linears}
    chosen = dict.fromkeys(widths, recipe.scheme) if recipe.mix is None else gguf.mixed(recipe.mix, source.config, widths)
    return {name: recipe.fitting(scheme, widths[name]) for name, scheme in chosen.items()}


def width_of(recipe: Recipe, source: Source, name: str) -> int:
    """How many columns of a linear may be in blocks: all, or those that the format keeps together."""
    columns = source.linears[name].in_features
    return gguf.unbroken(source.model.config.get_text_config(), name, columns) if recipe.written_format() == "gguf" else columns


def by_decoder_layer(names: Iterable[str]) -> list[list[str]]:
    """Runs of linears of one decoder layer: what is rounded together, and so in memory together."""
    return [list(group) for _, group in itertools.groupby(names, key=lambda name: re.match(r"(?:.*?\.\d+)?", name)[0])]  # type: ignore[index]


def stored_bits(recipe: Recipe, grid: Grid, stored: Tensor) -> int:
    """Bits of all that the linear's weight takes in the recipe's format; in dense ones of codes, scales and a rotation's signs."""
    shape, form, rotation = (stored.shape[0], stored.shape[1]), recipe.written_format(), recipe.rotation_of(grid)
    if form in FORMATS:
        return 8 * FORMATS[form].packed_bytes(shape, grid, _type_of(recipe, stored), rotation)
    return grid.stored_bits(shape, _type_of(recipe, stored)) + (sum(shape) if rotation else 0)


def _scale_dtype(recipe: Recipe, linear: Linear) -> torch.dtype:
    """The type of scales that are free to have any."""
    if linear.start is None:
        return _type_of(recipe, linear.stored)
    scale = linear.start.scales.get("scale")
    return torch.float16 if scale is None or scale.dtype not in FREE else scale.dtype


def _type_of(recipe: Recipe, weight: Tensor) -> torch.dtype:
    """Scales are stored in the format's type, if it has one, else in the weight's own, but never in more than 16 bits.

    float32 weights get float16 scales, three bits finer than bfloat16, where they stay clear of float16's narrow range.
    """
    form = recipe.written_format()
    fixed = FORMATS[form].scale_dtype if form in FORMATS else None
    if fixed is not None:
        return fixed
    if weight.dtype in (torch.float16, torch.bfloat16):
        return weight.dtype
    largest = weight.abs().max().item()
    return torch.float16 if 1e-2 < largest < 1e4 else torch.bfloat16
