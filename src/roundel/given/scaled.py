"""Originals in the scale of a file: some methods divide the channels between two layers before they round (AWQ, SmoothQuant).

    norm / s  ->  q, k, v times s by column          up (or v) / s by row  ->  down (or o) times s by column

The model computes the same, but its weights are no longer those of the original, to which codes are to be moved. So the original is scaled
in the same way. `s` of a norm is exact, the quotient of both norms. Between two linears it is the least-squares quotient of columns, where
any `s` would do, since both are rounded again; it is taken where it is far from 1 and the rows of the other one are divided by the same.

Which linears belong together is found by their values: no architecture is named. Not done: heads that are shared (`v` narrower than `o`),
which those methods leave out as well; biases of a scaled linear are divided with its rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from roundel.given.base import Given
from roundel.models import Checkpoint
from roundel.rounding.round import dequantized

__all__ = ["scales_of"]

NOTICED = 0.02
"""Median of `|s - 1|` from which on a linear is taken to be scaled; rounding to two bits makes less than this of a column's quotient."""

ALIKE = 0.1
"""How far two estimates of `s` may be apart, in the median."""


def scales_of(given: Given, checkpoint: Checkpoint, weight_of: Callable[[str], str | None]) -> dict[str, Callable[[Tensor], Tensor]]:
    """What makes each stored tensor of the original that the file has scaled what it would be there, by its name.

    Args:
        given: The file.
        checkpoint: The original.
        weight_of: The stored weight of each linear that is quantized in the file.
    """
    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    norms = _moved_norms(given, checkpoint)
    if not norms:
        return changes
    linears = {name: stored for name in given if (stored := weight_of(name)) is not None}
    for group in _by_layer([*linears, *norms]):
        here = {name: linears[name] for name in group if name in linears}
        columns = {name: _quotients(dequantized(given[name]), checkpoint.read(stored).float(), 0) for name, stored in here.items()}
        known = [(norm, s) for norm in group if norm in norms for s in norms[norm]]
        for name, found in list(columns.items()):
            norm, s = min([("", torch.ones_like(found)), *known], key=lambda each: _apart(found, each[1]))
            if norm and _apart(found, s) < ALIKE:
                changes[norm] = _as_in(given, norm)
                changes[here[name]] = _times(columns=s)
                del columns[name]
        rows = {}
        for name, stored in here.items():  # with what is known of their columns
            W = checkpoint.read(stored)
            rows[name] = _quotients(dequantized(given[name]), changes[stored](W) if stored in changes else W.float(), 1)
        for name, s in columns.items():
            before = _nearest(s, {own: 1 / found for own, found in rows.items() if own != name}) if _far(s) else None
            if before is None:
                continue
            changes[here[before]] = _times(rows=1 / s, after=changes.get(here[before]))
            changes[here[name]] = _times(columns=s)
            bias = here[before].removesuffix("weight") + "bias"
            if bias in checkpoint.files:
                changes[bias] = _as_in(given, bias)
    return changes


def _moved_norms(given: Given, checkpoint: Checkpoint) -> dict[str, tuple[Tensor, Tensor]]:
    """Of norms that are not the original's: by what their channels are divided, if they multiply by what is stored, or by one more."""
    found = {}
    for stored in checkpoint.files:
        value = given.value_of(stored) if stored.endswith("norm.weight") else None
        if value is None or value.ndim != 1:
            continue
        own = checkpoint.read(stored).float()
        if value.shape == own.shape and (value - own).norm() > 1e-3 * own.norm():
            found[stored] = own / value, (1 + own) / (1 + value)
    return found


def _quotients(W_hat: Tensor, W: Tensor, dim: int) -> Tensor:
    """Of each column (0) or row (1), by least squares."""
    return (W_hat * W).sum(dim) / W.square().sum(dim).clamp(min=torch.finfo(torch.float32).tiny)


def _far(s: Tensor) -> bool:
    return bool((s - 1).abs().median() > NOTICED)


def _apart(a: Tensor, b: Tensor) -> float:
    """How far two estimates are apart in the median, up to a factor: rows that are scaled as well leave one in the quotients of columns."""
    if a.shape != b.shape:
        return math.inf
    ratio = a / b
    return float((ratio / ratio.median() - 1).abs().median())


def _nearest(s: Tensor, others: Mapping[str, Tensor]) -> str | None:
    """The one whose rows have been divided by `s`."""
    found = min(others, key=lambda name: _apart(others[name], s), default=None)
    return found if found is not None and _apart(others[found], s) < ALIKE else None


def _as_in(given: Given, stored: str) -> Callable[[Tensor], Tensor]:
    return lambda _own: given.held(stored)


def _times(
    *, columns: Tensor | None = None, rows: Tensor | None = None, after: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Tensor], Tensor]:
    def scaled(W: Tensor) -> Tensor:
        W = W.float() if after is None else after(W)
        W = W if columns is None else W * columns
        return W if rows is None else W * rows[:, None]

    return scaled


def _by_layer(names: Iterable[str]) -> list[list[str]]:
    """Names of modules and tensors by the decoder layer that they are in; what is in none is a group, too."""
    groups: dict[str, list[str]] = {}
    for name in names:
        found = re.match(r".*?\.\d+\.", name)
        groups.setdefault(re.sub(r"^.*?(\w+\.\d+\.)$", r"\1", found[0]) if found else "", []).append(name)
    return list(groups.values())
