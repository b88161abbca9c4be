"""Plots of numbers by decoder layer and by method, as PNG bytes.

matplotlib's objects are used without pyplot, so that nothing is global: no current figure, no backend, no window. One colour
and one marker for each kind of linear or method, the same in every panel; after ten the colours come again with open markers.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter
from matplotlib.transforms import Bbox

__all__ = [
    "Point",
    "Series",
    "agreement",
    "curves",
    "heat_map",
    "histogram",
    "intervals",
    "lines",
    "place",
    "rates",
    "scatter",
    "stacked_bars",
]

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


def place(name: str) -> tuple[str, int]:
    """The kind of a linear and the index of its decoder layer: `self_attn.q_proj`, 3. Further numbers (experts) are not told apart."""
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", found[2]), int(found[1])) if found else (name, 0)


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
                markersize=4.5,
                linewidth=1.3,
                elinewidth=1,
                capsize=2,
                label=kind,
                **_style(index),
            )
        if reference is not None:
            axes.axhline(reference, color="0.5", linewidth=1, linestyle="--")
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _by_layer(axes)
        axes.set_ylim(bottom=0)
        axes.set_title(name, fontsize=10)
    grid[0].set_ylabel(ylabel)
    _legend(figure)
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
    _legend(figure)
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


def heat_map(cells: Mapping[str, Mapping[int, float]], *, title: str, label: str, logarithmic: bool = True) -> bytes:
    """A row for each kind of linear, a column for each decoder layer; what is not there is left white, numbers stand in few cells."""
    columns = sorted({layer for row in cells.values() for layer in row})
    figure = Figure(figsize=(min(16.0, 3.4 + max(4, len(columns)) * 0.55), 1.5 + 0.42 * len(cells)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    values = [[row.get(layer, float("nan")) for layer in columns] for row in cells.values()]
    known = [value for row in cells.values() for value in row.values()]
    positive = [value for value in known if value > 0]
    logarithmic = logarithmic and len(positive) > 0 and max(positive) > min(positive)
    norm = LogNorm(min(positive), max(positive)) if logarithmic else Normalize(min(known), max(known))
    shown = axes.imshow(values, aspect="auto", cmap="viridis", norm=norm)
    axes.set_yticks(range(len(cells)), list(cells))
    step = -(-len(columns) // 24)
    axes.set_xticks(range(0, len(columns), step), [str(layer) for layer in columns[::step]])
    axes.set_xlabel("decoder layer")
    if len(columns) <= 12:
        for across, layer in enumerate(columns):
            for down, row in enumerate(cells.values()):
                if layer in row:
                    dark = norm(row[layer]) < 0.6 if row[layer] > 0 or not logarithmic else True
                    axes.text(
                        across,
                        down,
                        f"{row[layer]:.1e}" if logarithmic else f"{row[layer]:.2f}",
                        fontsize=6.5,
                        ha="center",
                        va="center",
                        color="white" if dark else "black",
                    )
    figure.colorbar(shown, ax=axes, label=label)
    figure.suptitle(title, fontsize=11)
    return _png(figure)


def agreement(series: Mapping[str, Sequence[tuple[float, float]]], *, title: str, xlabel: str, ylabel: str) -> bytes:
    """`(x, y)` of each name, both logarithmic, beside the line on which they are equal."""
    figure = Figure(figsize=(7.4, 5.0), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for index, (name, points) in enumerate(series.items()):
        style = {**_style(index), "linestyle": ""}
        axes.plot([x for x, _ in points], [y for _, y in points], markersize=6, label=name, **style)
    every = [value for points in series.values() for pair in points for value in pair]
    ends = (min(every) / 1.5, max(every) * 1.5)
    axes.plot(ends, ends, color="0.5", linewidth=1, linestyle="--", label="equal")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(ends)
    axes.set_ylim(ends)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    _legend(figure)
    figure.suptitle(title, fontsize=11)
    return _png(figure)


def intervals(panels: Mapping[str, Sequence[tuple[str, float, float]]], *, title: str, xlabel: str) -> bytes:
    """A panel for each entry; in each a row for each `(name, value, standard error)`, the first one emphasised by a line."""
    longest = max(len(rows) for rows in panels.values())
    figure = Figure(figsize=(2.2 + 3.8 * len(panels), 1.6 + 0.3 * longest), dpi=DPI, layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, rows) in zip(grid, panels.items(), strict=True):
        places = range(len(rows))
        axes.barh(
            places, [row[1] for row in rows], xerr=[row[2] for row in rows], color=COLOURS[0], height=0.62, error_kw={"elinewidth": 1}
        )
        axes.set_yticks(places, [row[0] for row in rows])
        axes.axvline(rows[0][1], color=COLOURS[1], linestyle="--", linewidth=1)
        for place, row in zip(places, rows, strict=True):
            axes.annotate(
                f"{row[1]:#.3g}",
                (row[1] + row[2], place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            )
        axes.set_xlim(0, 1.22 * max(row[1] + row[2] for row in rows) or 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(axis="x", labelsize=9)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(xlabel, fontsize=9)
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
    grid[0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    return _png(figure)


def curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float]]]], *, title: str, xlabel: str, ylabel: str, doubling: bool = True
) -> bytes:
    """A panel for each entry; in each a curve of `(x, y, standard error)` for each name; `y` is logarithmic, and `x` where it doubles."""
    figure = Figure(figsize=(2.6 + 4.2 * len(panels), 4.2), dpi=DPI, layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    names = list(dict.fromkeys(label for named in panels.values() for label in named))
    for axes, (name, named) in zip(grid, panels.items(), strict=True):
        for label, points in named.items():
            axes.errorbar(
                [point[0] for point in points],
                [point[1] for point in points],
                yerr=[point[2] for point in points],
                markersize=4.5,
                linewidth=1.3,
                elinewidth=1,
                capsize=2,
                label=label,
                **_style(names.index(label)),
            )
        axes.set_yscale("log")
        if doubling:
            axes.set_xscale("log", base=2)
            ticks = sorted({point[0] for points in named.values() for point in points})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_minor_locator(NullLocator())
        _few_ticks(axes)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(xlabel)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    grid[0].set_ylabel(ylabel)
    _legend(figure)
    figure.suptitle(title, fontsize=11)
    return _png(figure)


def rates(
    families: Mapping[str, Sequence[tuple[str, float, float, float]]],
    *,
    title: str,
    ylabel: str,
    xlabel: str = "bits per weight, with scales and all else that is stored",
    bold: Collection[str] = (),
    logarithmic: bool = False,
) -> bytes:
    """Loss against size or time: for each family a curve of `(name, size, loss, standard error)`, points named where they have a name.

    Losses are logarithmic, sizes on request. Where some families are `bold` the others are thin, dashed and hollow.
    """
    figure = Figure(figsize=(9.0, 6.0), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    curves = [sorted(((x, y, error) for _, x, y, error in points)) for points in families.values()]
    for index, (family, curve) in enumerate(zip(families, curves, strict=True)):
        style = {**_style(index), "markersize": 5, "linewidth": 1.3}
        if family in bold:
            style |= {"linewidth": 2.2, "markersize": 6.5, "zorder": 3}
        elif bold:
            style |= {"linewidth": 1.0, "linestyle": "--", "markerfacecolor": "white"}
        sizes, losses, errors = zip(*curve, strict=True)
        axes.errorbar(sizes, losses, yerr=errors, elinewidth=1, capsize=2, label=family, **style)
    axes.set_yscale("log")
    _few_ticks(axes)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FormatStrFormatter("%.4g"))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.legend(loc="upper right", fontsize=9)  # larger is better, so that corner is empty
    _name_points(figure, axes, [(x, y, name) for points in families.values() for name, x, y, _ in points], curves)
    return _png(figure)


def _name_points(
    figure: Figure, axes: Axes, points: Sequence[tuple[float, float, str]], curves: Sequence[Sequence[tuple[float, float, float]]]
) -> None:
    """Writes each point's name beside it, where no other name, point, bar or curve is in the way, if there is such a place near by."""
    axes.margins(x=0.08, y=0.12)
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    figure.draw(renderer)  # only now is it known where points are

    def pixels(x: float, y: float) -> tuple[float, float]:
        across, up = axes.transData.transform((x, y))
        return float(across), float(up)

    taken = []
    for curve in curves:
        places = [pixels(x, y) for x, y, _ in curve]
        taken += [Bbox([[across - 5, up - 5], [across + 5, up + 5]]) for across, up in places]
        taken += [Bbox([pixels(x, y - error), pixels(x, y + error)]).padded(2) for x, y, error in curve if 0 < error < y]
        for (x0, y0), (x1, y1) in itertools.pairwise(places):
            parts = [step * 8 / (length or 1) for length in [math.dist((x0, y0), (x1, y1))] for step in range(1, int(length / 8))]
            taken += [Bbox.from_bounds(x0 + part * (x1 - x0) - 2, y0 + part * (y1 - y0) - 2, 4, 4) for part in parts]
    if (legend := axes.get_legend()) is not None:
        taken.append(legend.get_window_extent())
    inside = axes.get_window_extent()
    beside = [(side, height) for reach in range(1, 6) for height in (9 * reach, -9 * reach) for side in (7, -7)]
    for x, y, name in sorted(point for point in points if point[2]):
        best: tuple[int, Annotation, Bbox] | None = None
        for side, height in [(7, 0), (-7, 0), (0, 9), (0, -9), *beside]:
            text = axes.annotate(
                name,
                (x, y),
                xytext=(side, height),
                textcoords="offset points",
                fontsize=8,
                ha="left" if side > 0 else "right" if side < 0 else "center",
                va="center",
                arrowprops={"arrowstyle": "-", "linewidth": 0.4, "alpha": 0.5} if abs(height) > 9 else None,
            )
            text.set_in_layout(False)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # that of an annotation has its line in it
            crossed = sum(box.overlaps(other) for other in taken) + 10 * (not _within(box, inside))
            if best is None or crossed < best[0]:
                if best is not None:
                    best[1].remove()
                best = crossed, text, box
            else:
                text.remove()
            if crossed == 0:
                break
        assert best is not None
        taken.append(best[2])


def _within(box: Bbox, outer: Bbox) -> bool:
    return bool(outer.x0 <= box.x0 and box.x1 <= outer.x1 and outer.y0 <= box.y0 and box.y1 <= outer.y1)


def scatter(panels: Mapping[str, Sequence[tuple[str, float, float]]], *, title: str, ylabel: str, columns: int) -> bytes:
    """A panel for each entry, `columns` in a row; in each a marker for each `(name, x, y)`, the same for the same name everywhere."""
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(2.8 + 3.6 * columns, 0.8 + 3.0 * height), dpi=DPI, layout="constrained")
    grid = figure.subplots(height, columns, squeeze=False)
    names = list(dict.fromkeys(point[0] for points in panels.values() for point in points))
    for axes, (name, points) in zip(grid.flat, panels.items(), strict=False):
        for label, x, y in points:
            axes.plot(x, y, markersize=7, label=label, **{**_style(names.index(label)), "linestyle": ""})
        axes.set_title(name, fontsize=9)
        axes.set_ylabel(ylabel, fontsize=9)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    _legend(figure)
    figure.suptitle(title, fontsize=11)
    return _png(figure)


def _by_layer(axes: Axes) -> None:
    axes.set_xlabel("decoder layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def _style(index: int) -> dict[str, Any]:
    again = index // len(COLOURS) % 2 == 1
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markerfacecolor": "white" if again else COLOURS[index % len(COLOURS)],
        "linestyle": "--" if again else "-",
    }


def _few_ticks(axes: Axes) -> None:
    """Labels on a logarithmic y axis that do not overlap, and at least a few of them however narrow its range."""
    low, high = axes.get_ylim()
    if high < 5 * low:
        axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FormatStrFormatter("%.4g"))
    axes.set_ylim(low, high)


def _legend(figure: Figure) -> None:
    """All labels of all panels, once each, in a column of its own at the right; two from 21 on."""
    known: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    figure.legend(known.values(), known.keys(), loc="outside right upper", frameon=False, fontsize=9, ncols=1 + (len(known) - 1) // 20)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()  # not by savefig, which lays it out twice
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return buffer.getvalue()
