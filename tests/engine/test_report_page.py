"""The page that shows a report: complete, by itself, and true to the figures."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

from service.engine.metrics import ErrorSums
from service.engine.report import Budget, BudgetPoint, OutputReport, RunReport, TensorReport
from service.engine.report_page import MOST_BARS, MOST_ROWS, report_page


class Page(HTMLParser):
    """What a page holds: its tags with their attributes, and what it says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def count(self, tag: str) -> int:
        """How many there are."""
        return sum(each == tag for each, _ in self.tags)


def tensor(name: str, error: float, **fields: object) -> TensorReport:
    """A tensor of 4,096 weights at 4.25 bits with this relative error."""
    sums = ErrorSums(4096, 100.0, 100.0, 99.0, 100.0 * error**2, 0.1)
    report = TensorReport(name, (64, 64), "F32", "int4", "profile local", 16384, 2176, 0.1, "mse", 4, sums=sums)
    return replace(report, **fields)  # type: ignore[arg-type]


def report(*tensors: TensorReport, budget: Budget | None = None) -> RunReport:
    """Of one output with these tensors."""
    output = OutputReport("parquet", "parquet", 4, 0.9, tensors, 1 << 20, budget=budget)
    return RunReport("quantize", "text", "cpu", (output,), ("tensor a: <b>odd</b>",), 1.5)


def test_every_layer_has_its_bars_and_its_row_the_worst_first() -> None:
    copied = tensor("norm.weight", 0.0, scheme="none", sums=None)
    page = Page(report_page(report(tensor("a.weight", 0.01), tensor("b.weight", 0.2), copied)))
    assert page.count("rect") == 4
    text = "".join(page.texts)
    assert text.index("b.weight: int4, 4.25 bits, error 0.2") > 0
    rows = text[text.index("the worst first") :]
    assert rows.index("b.weight") < rows.index("a.weight")
    assert "norm.weight" not in text
    assert "2 tensors quantized, 1 copied" in text


def test_names_and_warnings_are_text_and_nothing_is_fetched_or_run() -> None:
    page = Page(report_page(report(tensor("<script>alert(1)</script><img src=x>", 0.1))))
    assert not {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "b"}
    assert not {name for _, attributes in page.tags for name in attributes} & {"src", "href", "onload"}
    assert "<b>odd</b>" in "".join(page.texts)


def test_the_page_of_a_huge_model_stays_small_and_shows_the_worst_of_it() -> None:
    many = [tensor(f"layers.{i}.weight", 0.5 if i == 4321 else 0.01) for i in range(20_000)]
    html = report_page(report(*many))
    page = Page(html)
    assert page.count("rect") <= 2 * MOST_BARS
    assert page.count("tr") == MOST_ROWS + 1
    assert html.count("layers.4321.weight") == 2  # its bar of error, and the first row
    assert "19500 better ones are left out" in "".join(page.texts)


def test_the_curve_of_a_budget_has_its_points_and_the_chosen_one() -> None:
    points = tuple(BudgetPoint(2.0 + i, 1000 * (2 + i), 0.3 / 2**i, {"int4": 1}) for i in range(5))
    page = Page(report_page(report(tensor("a.weight", 0.01), budget=Budget(points[2], True, points))))
    assert page.count("circle") == 6
    assert "4.000 bits, error 0.075: 1 × int4" in "".join(page.texts)


def test_what_has_no_error_or_no_layers_has_a_page_too() -> None:
    assert "quantized" in report_page(report())
    assert "error 0" in report_page(report(tensor("a.weight", 0.0)))
