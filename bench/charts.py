"""Draws the figures of a page as bars or curves, a picture for each page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

OURS, OTHERS, MARK = "#1f6f8b", "#b8c4c9", "#c1440e"
#: Inches: the width of a picture, the height of a bar, and that of a title with its axis.
WIDTH, BAR_HEIGHT, FRAME_HEIGHT = 9.0, 0.27, 1.0
DPI = 110
OTHER_DOT = {"color": MARK, "marker": "x", "linestyle": ""}


@dataclass(frozen=True, slots=True)
class Bar:
    """A value with its name; `ours` tells the service from what it is compared with, `mark` is the value to reach."""

    label: str
    value: float
    ours: bool = True
    mark: float | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars on one axis, from the top down; on a logarithmic one where the values are magnitudes apart."""

    title: str
    unit: str
    bars: Sequence[Bar]
    logarithmic: bool = False


def draw(charts: Sequence[Chart], path: Path) -> None:
    """Write all charts below each other as a PNG."""
    from matplotlib.figure import Figure  # takes a second, and only pages with pictures need it

    heights = [FRAME_HEIGHT + BAR_HEIGHT * len(chart.bars) for chart in charts]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    axes = figure.subplots(len(charts), squeeze=False, height_ratios=heights)[:, 0]
    for chart, axis in zip(charts, axes, strict=True):
        _draw_one(chart, axis)
    # Without the name of a release, so that the same figures are the same file.
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})


def _draw_one(chart: Chart, axis: Any) -> None:
    positions = range(len(chart.bars))
    values = [bar.value for bar in chart.bars]
    axis.barh(positions, values, color=[OURS if bar.ours else OTHERS for bar in chart.bars])
    for position, bar in enumerate(chart.bars):
        beside = max(bar.value, bar.mark or bar.value)
        axis.annotate(f"{bar.value:.3g}", (beside, position), (4, -3), textcoords="offset points", fontsize=8)
        if bar.mark is not None:
            axis.plot([bar.mark] * 2, [position - 0.4, position + 0.4], color=MARK, linewidth=2)
    axis.set_yticks(positions, [bar.label for bar in chart.bars], fontsize=8)
    axis.invert_yaxis()
    if chart.logarithmic:
        axis.set_xscale("log")
    axis.margins(x=0.12)
    axis.set_xlabel(chart.unit, fontsize=8)
    axis.set_title(chart.title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


@dataclass(frozen=True, slots=True)
class Curve:
    """Points (x, y) of one kind; ours are joined by steps, others stand alone. The first of a frame has its title."""

    title: str
    label: str
    points: Sequence[tuple[float, float]]
    ours: bool = True


def draw_curves(frames: Sequence[Sequence[Curve]], path: Path) -> None:
    """Write frames of dB over bits as a PNG, two beside each other; nothing where matplotlib is absent."""
    if not find_spec("matplotlib"):
        return
    from matplotlib.figure import Figure

    rows = -(-len(frames) // 2)
    figure = Figure(figsize=(WIDTH, 3 * rows), layout="constrained")
    for curves, axis in zip(frames, figure.subplots(rows, 2, squeeze=False).flat, strict=False):
        for curve in curves:
            style = {"color": OURS, "marker": ".", "linestyle": "-", "drawstyle": "steps-post"}
            axis.plot(*zip(*curve.points, strict=True), label=curve.label, **style | ({} if curve.ours else OTHER_DOT))
        axis.set_title(curves[0].title, fontsize=9, loc="left")
        axis.set_xlabel("bits of a weight, all counted", fontsize=8)
        axis.set_ylabel("dB", fontsize=8)
        axis.legend(fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})
