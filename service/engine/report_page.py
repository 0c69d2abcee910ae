"""A report for eyes: one HTML page with its charts as SVG, without scripts and without anything from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from service.engine.report import BudgetPoint, OutputReport, RunReport, TensorReport

if TYPE_CHECKING:
    from jinja2 import Template

#: Bars of a chart at most: of more layers each bar shows the highest of some neighbours.
MOST_BARS = 480
#: Rows of the table of layers at most, the worst first.
MOST_ROWS = 500
#: Size of a chart in its own units, and where its axes meet.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 960, 240, 56, 12, 12, 28
#: Colours are given to schemes in the order in which they appear.
COLOURS = ("#2a78d6", "#d9702b", "#4a9c5d", "#8b5fbf", "#c2a021", "#c2486b", "#3aa6a6", "#7a7a7a")


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark of an axis: where, and what stands beside it."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a chart, in its units; the title is what a pointer on it shows."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    title: str


@dataclass(frozen=True, slots=True)
class Dot:
    """A point of a curve."""

    x: float
    y: float
    title: str


@dataclass(frozen=True, slots=True)
class Layer:
    """A quantized tensor, as its row of the table shows it."""

    report: TensorReport
    error: float
    bits: float


def report_page(report: RunReport) -> str:
    """The page, as HTML that needs no network and runs no script."""
    shown = [_output(output) for output in report.outputs]
    return _template().render(report=report, outputs=shown, width=WIDTH, height=HEIGHT, left=LEFT, bottom=BOTTOM)


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined  # few who start the server ask for this form

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"bytes": _bytes, "share": _share, "figure": _figure}
    return environment.from_string((files("service.engine") / "report.html").read_text(encoding="utf-8"))


def _output(output: OutputReport) -> dict[str, Any]:
    layers = [_layer(t) for t in output.tensors if t.quality is not None]
    colours = _colours(layers)
    by_error = sorted(layers, key=lambda layer: -layer.error)
    return {
        "report": output,
        "layers": layers,
        "colours": colours,
        "errors": _errors(layers, colours),
        "bits": _bits(layers, colours),
        "curve": _curve(output),
        "worst": by_error[:MOST_ROWS],
        "copied": sum(t.quality is None for t in output.tensors),
        "measured": "output" if any(t.sums and t.sums.has_output for t in output.tensors) else "weights",
    }


def _layer(tensor: TensorReport) -> Layer:
    sums, quality = tensor.sums, tensor.quality
    assert sums is not None, "of a copy there is nothing to show"
    assert quality is not None, "it follows from the sums"
    error = sums.output_relative_error if sums.has_output else sums.relative_error
    return Layer(tensor, error, quality.bits_per_weight)


def _colours(layers: Sequence[Layer]) -> dict[str, str]:
    schemes = dict.fromkeys(layer.report.scheme for layer in layers)
    return {scheme: COLOURS[index % len(COLOURS)] for index, scheme in enumerate(schemes)}


def _errors(layers: Sequence[Layer], colours: dict[str, str]) -> dict[str, Any]:
    """Relative errors on a logarithmic axis; what is exact has no bar."""
    positive = [layer.error for layer in layers if 0 < layer.error < math.inf]
    if not positive:
        return {"bars": [], "ticks": []}
    low, high = math.floor(math.log10(min(positive)) - 0.01), math.ceil(math.log10(max(positive)) + 0.01)

    def share(layer: Layer) -> float:
        inside = min(max(layer.error, 10.0**low), 10.0**high)
        return (math.log10(inside) - low) / (high - low)

    ticks = [Tick(_y((power - low) / (high - low)), f"{10.0**power:g}") for power in range(low, high + 1)]
    return {"bars": list(_bars(layers, share, colours)), "ticks": ticks}


def _bits(layers: Sequence[Layer], colours: dict[str, str]) -> dict[str, Any]:
    """Bits per weight, with scales and all."""
    top = max([2.0, *(math.ceil(layer.bits) for layer in layers)])
    ticks = [Tick(_y(bits / top), f"{bits:g}") for bits in _steps(top)]
    return {"bars": list(_bars(layers, lambda layer: layer.bits / top, colours)), "ticks": ticks}


def _bars(layers: Sequence[Layer], share: Callable[[Layer], float], colours: dict[str, str]) -> Iterator[Bar]:
    each = max(1, -(-len(layers) // MOST_BARS))
    groups = [layers[start : start + each] for start in range(0, len(layers), each)]
    step = (WIDTH - LEFT - RIGHT) / max(1, len(groups))
    for index, group in enumerate(groups):
        layer = max(group, key=share)
        height = max(1.0, share(layer) * (HEIGHT - TOP - BOTTOM))
        among = f", the highest of {len(group)} neighbours" if len(group) > 1 else ""
        yield Bar(
            x=LEFT + index * step,
            y=HEIGHT - BOTTOM - height,
            width=max(0.5, step * 0.84),
            height=height,
            colour=colours[layer.report.scheme],
            title=f"{layer.report.name}: {layer.report.scheme}, {layer.bits:.2f} bits,"
            f" error {_figure(layer.error)}{among}",
        )


def _curve(output: OutputReport) -> dict[str, Any] | None:
    """Error over size, of the choices that there were under a budget."""
    budget = output.budget
    if budget is None or len(budget.curve) < 2:
        return None
    bits = [point.bits_per_weight for point in budget.curve]
    errors = [max(point.relative_error, 1e-9) for point in budget.curve]
    left, right = math.floor(min(bits)), math.ceil(max(bits) + 1e-9)
    low, high = math.floor(math.log10(min(errors)) - 0.01), math.ceil(math.log10(max(errors)) + 0.01)

    def dot(point: BudgetPoint) -> Dot:
        across = (point.bits_per_weight - left) / (right - left)
        error = math.log10(max(point.relative_error, 1e-9))
        schemes = ", ".join(f"{count} × {scheme}" for scheme, count in point.schemes.items())
        title = f"{point.bits_per_weight:.3f} bits, error {_figure(point.relative_error)}: {schemes}"
        return Dot(LEFT + across * (WIDTH - LEFT - RIGHT), _y((error - low) / (high - low)), title)

    dots = [dot(point) for point in budget.curve]
    return {
        "dots": dots,
        "path": " ".join(f"{d.x:.1f},{d.y:.1f}" for d in dots),
        "chosen": dot(budget.chosen),
        "ticks": [Tick(_y((power - low) / (high - low)), f"{10.0**power:g}") for power in range(low, high + 1)],
        "below": [
            Tick(LEFT + (at - left) / (right - left) * (WIDTH - LEFT - RIGHT), f"{at} bits")
            for at in range(left, right + 1)
        ],
    }


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _steps(top: float) -> list[float]:
    step = 1 if top <= 6 else 2
    return [float(value) for value in range(0, int(top) + 1, step)]


def _figure(value: float | None) -> str:
    """Three digits that count."""
    return "–" if value is None else f"{value:.3g}"


def _share(value: float) -> str:
    """A cosine similarity: as many digits as tell it from 1."""
    return f"{value:.6f}".rstrip("0").rstrip(".") if value > 0.999 else f"{value:.4f}"


def _bytes(value: float) -> str:
    """In the unit that fits."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
