"""Draws the figures of a page as bars, a picture for each page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS, OTHERS, MARK = "#1f6f8b", "#b8c4c9", "#c1440e"
#: Inches: the width of a picture, the height of a bar, and that of a title with its axis.
WIDTH, BAR_HEIGHT, FRAME_HEIGHT = 9.0, 0.27, 1.0
DPI = 110


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
