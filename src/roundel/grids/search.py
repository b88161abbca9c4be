"""Searches for scales of groups, as the families share them: least squared error, weighted by column.

For fixed codes the error is a quadratic in the scale, so a candidate is judged by its codes alone: `q = nearest(x / s)` explains
`<w x, q>^2 / <w q, q>` of the norm, and the best scale of these codes is `<w x, q> / <w q, q>`. A candidate is one pass over the weights,
about ten elementwise operations; rows are taken in chunks that stay in a CPU's cache (`by_rows`): 0.1 s for a pass over 4096 x 4096 on one
core. All functions expect groups of size about 1 (`group_size`), where squares neither overflow nor vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Nearest", "by_rows", "column_weights", "group_size", "integers", "nonzero", "positive", "search_range", "search_scale", "table"]

Nearest = Callable[[Tensor], Tensor]
"""Rounds values in units of the scale to the nearest level."""

CHUNK = {"cpu": 2**17, "cuda": 2**24}
"""Weights fitted at a time."""

SHRINK = (0.0, 0.45, 6)
"""How much of a range may be cut off at each end: least, most, and how many values are tried before the refinement."""


def by_rows(W: Float[Tensor, "d_out d_in"], fit: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
    """`fit` of chunks of rows, put together."""
    rows = max(1, CHUNK.get(W.device.type, 2**17) // W.shape[1])
    fitted = [fit(part) for part in W.split(rows)]
    return {name: torch.cat([each[name] for each in fitted]) for name in fitted[0]}


def column_weights(weights: Float[Tensor, " d_in"], like: Tensor) -> Float[Tensor, " d_in"]:
    """Weights of mean about 1, none of them zero, in the type of `like`."""
    scaled = weights.double() / nonzero(weights.double().mean())
    return scaled.clamp(min=1e-6).to(like.dtype)


def nonzero(values: Tensor) -> Tensor:
    """1 where values are zero."""
    return torch.where(values == 0, 1.0, values)


def group_size(grouped: Tensor, least: float = 0.0) -> Tensor:
    """Largest magnitude of the last dimension, at least `least`; 1 where both are zero."""
    return nonzero(grouped.abs().amax(-1).clamp(min=least))


def integers(low: int, high: int) -> Nearest:
    """Rounding to integers of a range."""
    return lambda units: units.round().clamp_(low, high)


def table(levels: Sequence[float], spacing: float) -> Nearest:
    """Rounding to ascending levels whose midpoints, counted from the lowest level, are multiples of `spacing`: by looking up cells.

    Ties go either way. (`torch.bucketize` is right everywhere and 40 times slower.)
    """
    exact = torch.tensor(levels, dtype=torch.float64)
    cells = levels[0] + spacing * (torch.arange(round((levels[-1] - levels[0]) / spacing) + 1) + 0.5)
    looked_up = exact[torch.bucketize(cells.double(), (exact[1:] + exact[:-1]) / 2)]

    def nearest(units: Tensor) -> Tensor:
        cell = units.clamp(levels[0], levels[-1]).sub_(levels[0]).div_(spacing).to(torch.int32)
        return looked_up.to(units).index_select(0, cell.flatten()).view(units.shape)

    return nearest


def nearest_e4m3(units: Tensor) -> Tensor:
    """The nearest finite e4m3 numbers: multiples of an eighth of the power of two below each value."""
    clamped = units.to(torch.float32).clamp(-448, 448)
    spacing = (clamped.abs().clamp_(min=2.0**-6).view(torch.int32) & 0x7F800000).view(torch.float32).div_(8)
    return (clamped / spacing).round_().mul_(spacing).to(units.dtype)


def search_scale(
    x: Float[Tensor, "*groups size"],
    w: Tensor,
    nearest: Nearest,
    *,
    ends: tuple[float, float] | tuple[int, int],
    fractions: Sequence[float],
    signs: Sequence[float] = (1.0, -1.0),
    polish: int = 2,
) -> Float[Tensor, "*groups"]:
    """The scale of each group, of either sign if both are given; zero where a group is.

    Args:
        x: groups of size about 1.
        w: column weights that broadcast to `x`.
        nearest: rounds `x / scale`.
        ends: lowest and highest level.
        fractions: magnitudes tried, in units of the smallest that clips neither end.
        signs: signs tried.
        polish: steps of alternation between codes and their best scale, at the end.
    """
    weighted = w * x
    top, bottom = x.amax(-1).clamp(min=0), (-x.amin(-1)).clamp(min=0)
    best = torch.zeros_like(top)
    best_gain = torch.full_like(top, -1.0)

    def closed_form(scale: Tensor) -> tuple[Tensor, Tensor]:
        q = nearest(x / nonzero(scale).unsqueeze(-1))
        cross, norm = (weighted * q).sum(-1), (w * q.square_()).sum(-1)
        better = torch.where(norm > 0, cross / nonzero(norm), scale)
        return better, better * cross

    for sign in signs:
        positive, negative = (top, bottom) if sign > 0 else (bottom, top)
        unclipped = torch.maximum(positive / ends[1], negative / -ends[0]) if ends[0] < 0 else positive / ends[1]
        for fraction in fractions:
            scale, gain = closed_form(sign * fraction * unclipped)
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            best = torch.where(better, scale, best)
    for _ in range(polish):
        best, _ = closed_form(best)
    return best


def search_range(
    low: Float[Tensor, "*groups"], high: Float[Tensor, "*groups"], score: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """The best parameters over ranges cut at both ends jointly: a grid of cuts, then twice the eight neighbours at half the distance.

    Args:
        low: lowest value of each group.
        high: highest value of each group, not below `low`.
        score: of ranges, the gain and then parameters.

    Returns:
        The parameters of the greatest gain.
    """
    width = high - low
    least, most, steps = SHRINK
    spacing = (most - least) / (steps - 1)
    line = [least + k * spacing for k in range(steps)]
    best: tuple[Tensor, ...] = ()
    cut_low = cut_high = torch.zeros_like(low)

    def consider(at_low: Tensor, at_high: Tensor) -> None:
        nonlocal best, cut_low, cut_high
        tried = score(low + at_low * width, high - at_high * width)
        better = torch.ones_like(low, dtype=torch.bool) if not best else tried[0] > best[0]
        best = tried if not best else tuple(torch.where(better, new, old) for new, old in zip(tried, best, strict=True))
        cut_low, cut_high = torch.where(better, at_low, cut_low), torch.where(better, at_high, cut_high)

    for a in line:
        for b in line:
            consider(torch.full_like(low, a), torch.full_like(low, b))
    for _ in range(2):
        spacing /= 2
        centre_low, centre_high = cut_low, cut_high
        for a in (-spacing, 0.0, spacing):
            for b in (-spacing, 0.0, spacing):
                if a or b:
                    consider(centre_low + a, centre_high + b)
    return best[1:]


def positive(values: Tensor, like: Tensor) -> Tensor:
    """Wanted scales where they are positive and representable in the type of `like`, else those of `like`."""
    limits = torch.finfo(like.dtype)
    kept = values.clamp(max=limits.max).to(like.dtype)
    return torch.where(values > limits.tiny, kept, like)
