"""What a job will take on the disk before its checkpoint is there, said before it starts.

A bound, from shapes alone: what linears of a group read in common is counted for each of them, and nothing is taken off for what is
dropped early. Where the work directory is kept everything is in files, else hidden states only as far as they do not fit into memory, and
nothing of the state of tuning.

Not counted: weights that Transformers has to convert before they can be loaded one layer at a time, and the output itself.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass

import torch

from roundel.artifacts.factors import FactorsDirectory
from roundel.artifacts.source import Source
from roundel.artifacts.work import Work
from roundel.calibration import Split
from roundel.curvature import parse_curvature
from roundel.recipes import Recipe
from roundel.stages.notes import Notes

__all__ = ["Space", "bound", "say_space"]

SAID = 1 << 26
"""Bytes from which on a temporary directory is spoken of."""

CODES = 4
"""Bytes for each weight at most: int8 codes, or those of tiles, and scales or vectors."""

STEPS = 2 * 24
"""Bytes for each code that is tuned: the optimiser's state (`tuning.steps`) and the best codes, twice while it is being replaced."""


@dataclass(frozen=True)
class Space:
    """Bytes at most of each kind, which may all be there at once but for hidden states, which are those of the larger sweep."""

    hidden_states: int
    curvature: int
    codes: int
    tuning: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


def bound(recipe: Recipe, source: Source, split: Split, work: Work) -> Space:
    """Of a job."""
    layers, linears = source.layers, source.linears
    weights = sum(linear.weight.numel() for linear in linears.values())
    state = layers.embed(split.used.ids[:1].to(layers.device)).nbytes
    hidden = (len(layers) + 3) * len(split.used) * state
    if recipe.corrects(split.calibration.ids.numel()):
        hidden = max(hidden, _rounding(recipe, source, split, state))
    size = getattr(torch, recipe.factor_type).itemsize
    groups = parse_curvature(recipe.curvature).row_groups
    triangles = sum(groups * (_triangle(linear.in_features) + _triangle(-(-linear.out_features // groups))) for linear in linears.values())
    places, _ = recipe.natural_steps(*split.calibration.ids.shape, weights=weights)
    moved = (places if work.kept else 0) * weights * source.model.dtype.itemsize
    others = source.parameters - weights if recipe.tune_rest is not False else 0
    return Space(
        hidden_states=hidden if work.kept else max(0, hidden - work.hidden),
        curvature=size * triangles,
        codes=CODES * weights + moved,
        tuning=STEPS * (weights + others) if work.kept and recipe.tune != "none" else 0,
    )


def say_space(recipe: Recipe, source: Source, split: Split, stored: FactorsDirectory | None, notes: Notes, *, work: Work) -> None:
    """Tells the user, and warns where the disk has less."""
    found = bound(recipe, source, split, work)
    if not work.kept and found.total < SAID:
        return
    parts = ", ".join(f"{name.replace('_', ' ')} {_gigabytes(size)}" for name, size in asdict(found).items() if size)
    notes.progress.say(f"{work.path}: up to {_gigabytes(found.total)} GB until the checkpoint is written ({parts})")
    free = shutil.disk_usage(work.path).free
    if free < found.total:
        notes.warn(
            f"the disk of {work.path} has {_gigabytes(free)} GB free, and up to {_gigabytes(found.total)} may be needed"
            + (": --factor-type bfloat16, fewer --sequences or another --work take less" if stored is None else "")
        )


def _rounding(recipe: Recipe, source: Source, split: Split, state: int) -> int:
    """Hidden states of both paths before and after a group, what its linears read and add to, and what natural-gradient steps refer to.

    `state`: bytes of one sequence's hidden state.
    """
    layers, (found, length) = source.layers, split.everything.ids.shape
    count, item = min(recipe.prefix_count, found), source.model.dtype.itemsize
    widest = max(
        sum(source.linears[name].in_features + source.linears[name].out_features for name in layers.inside(index, source.linears))
        for index in range(len(layers))
    )
    return count * (7 * state + widest * length * item)


def _triangle(size: int) -> int:
    return size * (size + 1) // 2


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2g}" if size < 1e11 else f"{size / 1e9:.0f}"
