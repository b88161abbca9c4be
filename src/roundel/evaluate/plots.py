"""Plots of numbers by decoder layer, as PNG bytes.

matplotlib's objects are used without pyplot, so that nothing is global: no current figure, no backend, no window. One colour
and one marker for each kind of linear, the same in every plot of the same kinds.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

__all__ = ["Point", "Series", "histogram", "lines", "stacked_bars"]

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bb7733", "#777777", "#000000", "#99cc33")
MARKERS = "osD^vPX*<>"
DPI = 144


@dataclass(frozen=True, kw_only=True)
class Point:
    """A value at a decoder layer, with its standard error if it has one."""

    layer: int
    value: float
    error: float | None = None


Series = Mapping[str, Sequence[Point]]
"""Points by the kind of linear that they belong to."""


def lines(panels: Mapping[str, Series], *, title: str, ylabel: str, percent: bool = False, reference: float | None = None) -> bytes:
    """A panel for each entry, one beside the other with one y axis; in each a line with error bars for each kind.

    `reference` draws a dashed line across; `percent` shows fractions as percentages.
    """
    figure = Figure(figsize=(2.6 + 4.6 * len(panels), 4.2), dpi=DPI, layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    kinds = list(dict.fromkeys(kind for series in panels.values() for kind in series))
    for axes, (name, series) in zip(grid, panels.items(), strict=True):
        for kind, points in series.items():
            index = kinds.index(kind)
            axes.errorbar(
                [point.layer for point in points],
                [point.value for point in points],
                yerr=[point.error or 0.0 for point in points] if any(point.error for point in points) else None,
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=4.5,
                linewidth=1.3,
                elinewidth=1,
                capsize=2,
                label=kind,
            )
        if reference is not None:
            axes.axhline(reference, color="0.5", linewidth=1, linestyle="--")
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _by_layer(axes)
        axes.set_ylim(bottom=0)
        axes.set_title(name, fontsize=10)
    grid[0].set_ylabel(ylabel)
    _legend(figure, grid[0])
    figure.suptitle(title, fontsize=11)
    return _png(figure)


def stacked_bars(series: Series, *, title: str, ylabel: str) -> bytes:
    """A bar for each decoder layer, made of its linears."""
    figure = Figure(figsize=(8.4, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    height: dict[int, float] = {}
    for index, (kind, points) in enumerate(series.items()):
        bottoms = [height.get(point.layer, 0.0) for point in points]
        axes.bar(
            [point.layer for point in points],
            [point.value for point in points],
            bottom=bottoms,
            color=COLOURS[index % len(COLOURS)],
            width=0.8,
            label=kind,
        )
        height.update({point.layer: bottom + point.value for point, bottom in zip(points, bottoms, strict=True)})
    _by_layer(axes)
    axes.set_ylabel(ylabel)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
    _legend(figure, axes)
    figure.suptitle(title, fontsize=11)
    return _png(figure)


def histogram(values: Sequence[float], *, title: str, xlabel: str, ylabel: str) -> bytes:
    """How often values from 0 to 1 occur, in 25 bins, with their median."""
    figure = Figure(figsize=(6.4, 4.0), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.hist(values, bins=[k / 25 for k in range(26)], color=COLOURS[0], edgecolor="white")
    ordered = sorted(values)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    axes.axvline(middle, color=COLOURS[1], linestyle="--", linewidth=1.3, label=f"median {middle:.2f}")
    axes.set_xlim(0, 1)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    figure.suptitle(title, fontsize=11)
    return _png(figure)


def _by_layer(axes: Axes) -> None:
    axes.set_xlabel("decoder layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
