"""What all benchmarks share: medians with their spread, the machine in words, Markdown tables, result files."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.charts import Chart, draw

RESULTS = Path(__file__).parent / "results"
GB = 1e9
MB = 1e6
GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Samples:
    """Repeated measurements of one thing, in one unit."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    @property
    def best(self) -> float:
        """The smallest one."""
        return min(self.values)

    @property
    def worst(self) -> float:
        """The largest one."""
        return max(self.values)

    @property
    def spread(self) -> float:
        """Distance between the quartiles as a share of the median: 0.02 means that runs agree within 2%."""
        if len(self.values) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return (high - low) / self.median if self.median else 0.0

    def percentile(self, percent: float) -> float:
        """The value that `percent` of all do not exceed."""
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def measure(call: Callable[[], object], *, repeats: int, warm_up: int = 1) -> Samples:
    """Seconds that `call` takes, `repeats` times, after `warm_up` calls that do not count."""
    for _ in range(warm_up):
        call()
    return Samples(tuple(seconds(call) for _ in range(repeats)))


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table: the first column to the left, all others to the right, columns aligned as text."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(head), *cells]) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [_line(head, widths), _line(rule, widths), *(_line(row, widths) for row in cells)]
    return "\n".join(lines)


def write_result(
    name: str,
    title: str,
    *parts: str,
    packages: Sequence[str] = ("numpy", "numba", "pyarrow"),
    charts: Sequence[Chart] = (),
    folder: Path = RESULTS,
) -> Path:
    """Print a benchmark's page and write it to `<name>.md` in a folder, machine and versions below its title.

    The charts become `<name>.png` beside it, which the page shows; where matplotlib is absent it goes without.
    """
    folder.mkdir(exist_ok=True)
    picture = []
    if charts and find_spec("matplotlib"):
        draw(charts, folder / f"{name}.png")
        picture = [f"![{'; '.join(chart.title for chart in charts)}]({name}.png)"]
    page = "\n\n".join([f"# {title}", machine(packages), *(part.strip() for part in parts), *picture]) + "\n"
    print(page, flush=True)
    path = folder / f"{name}.md"
    path.write_text(page, encoding="utf-8")
    return path


def machine(packages: Sequence[str]) -> str:
    """Processor, memory, system, versions, date, and how busy the machine was already."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    versions = ", ".join(f"{name} {_version(name)}" for name in packages)
    return "\n".join(
        [
            f"- {_processor()}, {cores()} cores, {memory:.0f} GiB",
            f"- {platform.system()} {platform.release()}, Python {platform.python_version()}, {versions}",
            f"- {datetime.now(UTC):%Y-%m-%d}; load average at the end of the run {os.getloadavg()[0]:.1f}",
        ]
    )


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def below(folder: Path) -> Iterator[Path]:
    """Every file below a folder in which files and folders come and go meanwhile."""
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def note(text: str) -> None:
    """Say on stderr what is going on: a page is printed only when it is complete."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _line(cells: Sequence[Any], widths: Sequence[int]) -> str:
    first, *others = (str(cell) for cell in cells)
    aligned = [first.ljust(widths[0]), *(o.rjust(w) for o, w in zip(others, widths[1:], strict=True))]
    return f"| {' | '.join(aligned)} |"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
