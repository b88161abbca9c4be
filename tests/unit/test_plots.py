"""Plots can be read: everything is named, nothing that is written overlaps, and no two names look the same."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from roundel.evaluate import plots

NAMES = [*(f"method-{k}" for k in range(14)), "fastkron:steps=4:batch=128"]
COUNTS = (32, 64, 128, 256, 512)


def drawn(monkeypatch: pytest.MonkeyPatch, plot: Callable[[], bytes]) -> Figure:
    """The figure in place of its picture, laid out as the picture is."""
    with monkeypatch.context() as patch:
        patch.setattr(plots, "_png", lambda figure: figure)
        figure = plot()
    assert isinstance(figure, Figure)
    FigureCanvasAgg(figure).draw()
    return figure


def boxes(texts: Sequence[Text]) -> list[Bbox]:
    return [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]


def assert_apart(found: Sequence[Bbox]) -> None:
    for one, other in itertools.combinations(found, 2):
        assert not one.overlaps(other), (one, other)


def visible_labels(axes: Axes, side: str) -> list[Text]:
    axis = getattr(axes, f"{side}axis")
    low, high = sorted(axis.get_view_interval())
    ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
    return [label for place, label in ticks if low <= place <= high and label.get_text()]


def legend_of(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def rows(scale: float) -> list[tuple[str, float, float]]:
    chooser = random.Random(0)
    return [(name, scale * (1 + chooser.random()), 0.1 * scale) for name in NAMES]


def spread(low: float, high: float) -> dict[str, list[tuple[float, float, float]]]:
    """A curve for each name, together from `low` to `high`."""
    values = np.geomspace(low, high, len(NAMES) * len(COUNTS)).reshape(len(NAMES), len(COUNTS))
    return {
        name: [(count, y, 0.01 * y) for count, y in zip(COUNTS, own, strict=True)] for name, own in zip(NAMES, values.tolist(), strict=True)
    }


def test_intervals_name_every_row_and_write_every_value(monkeypatch) -> None:
    panels = {"int2": rows(1.1), "int3": rows(0.19), "int8": rows(1.2e-4)}
    figure = drawn(monkeypatch, lambda: plots.intervals(panels, title="title", xlabel="nats per token"))
    assert [axes.get_title() for axes in figure.axes] == list(panels)
    assert [label.get_text() for label in visible_labels(figure.axes[0], "y")] == NAMES
    tops = [label.get_window_extent().y0 for label in visible_labels(figure.axes[0], "y")]
    assert tops == sorted(tops, reverse=True)  # the first one on top
    for axes, (name, own) in zip(figure.axes, panels.items(), strict=True):
        assert [text.get_text() for text in axes.texts] == [f"{value:#.3g}" for _, value, _ in own], name
        assert_apart(boxes(axes.texts))
        assert all(axes.get_window_extent().x1 >= box.x1 for box in boxes(axes.texts))
        assert 3 <= len(visible_labels(axes, "x")) <= 6
        widths = [bar.get_width() for bar in axes.patches]
        assert widths == [value for _, value, _ in own]
        assert any(list(line.get_xdata()) == [own[0][1]] * 2 for line in axes.lines)  # the first one's line across
    assert_apart(boxes([label for axes in figure.axes for label in visible_labels(axes, "x")]))


@pytest.mark.parametrize(("low", "high"), [(0.0471, 0.0489), (0.11, 0.13), (0.19, 0.47), (0.02, 1.1), (1e-4, 2.5), (1.1e-4, 1.3e-4)])
def test_curves_have_labels_that_can_be_read_over_any_range(low: float, high: float, monkeypatch) -> None:
    figure = drawn(monkeypatch, lambda: plots.curves({"one": spread(low, high)}, title="title", xlabel="n", ylabel="KL"))
    (axes,) = figure.axes
    assert [label.get_text() for label in visible_labels(axes, "x")] == [str(count) for count in COUNTS]
    labels = visible_labels(axes, "y")
    assert 3 <= len(labels) <= 14
    assert_apart(boxes(labels))
    assert axes.yaxis.get_minorticklocs().size == axes.xaxis.get_minorticklocs().size == 0
    assert len({label.get_text() for label in labels}) == len(labels)
    for label, place in zip(labels, [tick for tick in axes.get_yticks() if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]], strict=True):
        assert float(label.get_text()) == pytest.approx(place, rel=1e-3)


def test_the_legend_is_complete_and_no_two_entries_look_alike(monkeypatch) -> None:
    every = spread(0.1, 0.4)
    panels = {"few": {name: every[name] for name in NAMES[3:6]}, "all": every}
    figure = drawn(monkeypatch, lambda: plots.curves(panels, title="title", xlabel="n", ylabel="KL"))
    assert sorted(legend_of(figure)) == sorted(NAMES)
    looks: dict[str, set[tuple[str, ...]]] = {}
    for axes in figure.axes:
        for container in axes.containers:
            line = container.lines[0]
            look = (to_hex(line.get_color()), str(line.get_marker()), to_hex(line.get_markerfacecolor()), str(line.get_linestyle()))
            looks.setdefault(str(container.get_label()), set()).add(look)
    assert all(len(own) == 1 for own in looks.values())  # the same in both panels
    assert len(set().union(*looks.values())) == len(NAMES)
    (legend,) = figure.legends
    assert_apart([legend.get_window_extent(), *(axes.get_window_extent() for axes in figure.axes)])


def test_scatter_names_every_point_of_every_panel(monkeypatch) -> None:
    panels = {f"panel {k}": [(name, k + index, 2.0 * index) for index, name in enumerate(NAMES[k : k + 13])] for k in range(3)}
    figure = drawn(monkeypatch, lambda: plots.scatter(panels, title="title", ylabel="KL", columns=2))
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == list(panels)
    assert sorted(legend_of(figure)) == sorted(NAMES)
    for axes, points in zip(shown, panels.values(), strict=True):
        found = [(line.get_label(), line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines]
        assert found == points
        assert_apart(boxes(visible_labels(axes, "y")))
        assert_apart(boxes(visible_labels(axes, "x")))
    looks = {
        (to_hex(line.get_color()), str(line.get_marker()), to_hex(line.get_markerfacecolor())) for axes in shown for line in axes.lines
    }
    assert len(looks) == len(NAMES)


def test_many_names_still_fit_beside_the_plot(monkeypatch) -> None:
    points = [(f"name {k}", float(k), float(k)) for k in range(26)]
    figure = drawn(monkeypatch, lambda: plots.scatter({"one": points}, title="title", ylabel="KL", columns=1))
    (legend,) = figure.legends
    assert len(legend_of(figure)) == 26
    assert legend.get_window_extent().y0 >= 0


def test_a_picture_is_what_was_drawn() -> None:
    plain = plots.scatter({"one": []}, title="", ylabel="", columns=1)
    full = plots.scatter({"one": [("a", 1.0, 2.0), ("b", 2.0, 1.0)]}, title="", ylabel="", columns=1)
    assert plots.scatter({"one": [("a", 1.0, 2.0), ("b", 2.0, 1.0)]}, title="", ylabel="", columns=1) == full

    def coloured(png: bytes) -> set[str]:
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)
        return {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in np.unique(pixels, axis=0)} & set(plots.COLOURS[:3])

    assert coloured(plain) == set()
    assert coloured(full) == set(plots.COLOURS[:2])
