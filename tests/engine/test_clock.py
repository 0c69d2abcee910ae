"""Where the time of a run goes: no moment is lost or counted twice, and a run that goes on keeps what it spent."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.backends.reference import ReferenceBackend
from service.engine.clock import Clock, Part, Times
from service.engine.formats.registry import open_model
from service.engine.pipeline import JOURNAL, quantize
from service.engine.plan import make_plan
from service.engine.progress import Progress
from service.errors import Cancelled
from tests.engine.helpers import normal, save_folder, specs

PARTS = st.sampled_from(["read", "quantize", "write", "hash"])


@given(st.lists(st.tuples(PARTS, st.integers(0, 2)), max_size=30))
def test_the_parts_add_up_to_the_time_from_the_first_turn_to_the_last(steps: list[tuple[Part, int]]) -> None:
    clock = Clock()
    begun = time.perf_counter()
    clock.turn("plan")
    for part, depth in steps:
        with clock.during(part):
            for _ in range(depth):
                with clock.during("read", nbytes=10):
                    pass
    last = time.perf_counter()
    clock.turn(None)
    ended = time.perf_counter()
    total = sum(clock.here.seconds.values())
    assert last - begun - 1e-3 <= total <= ended - begun + 1e-9
    assert clock.here.nbytes.get("read", 0) == 10 * sum(depth for _, depth in steps)


def test_a_clock_is_looked_at_without_being_stopped() -> None:
    clock = Clock()
    clock.turn("quantize")
    first, second = clock.here.seconds["quantize"], clock.here.seconds["quantize"]
    assert 0 < first < second
    assert Clock().here == Times()


def test_a_part_ends_with_an_error_as_well() -> None:
    clock = Clock()
    clock.turn("quantize")
    with pytest.raises(ValueError, match="x"), clock.during("write"):
        raise ValueError("x")
    assert clock.turn(None) == "quantize"


def test_a_run_counts_its_bytes_and_puts_its_parts_into_the_report(tmp_path: Path) -> None:
    tensors = {f"l.{i}.weight": normal(64, 128, seed=i) for i in range(4)} | {"norm.weight": normal(128)}
    model = save_folder(tmp_path / "model", tensors)
    clock = Clock()
    report = run(model, tmp_path / "work", clock)
    source = sum(t.nbytes for t in tensors.values())
    files = [file for output in report.outputs for file in output.files]
    assert report.stage_bytes["read"] == source
    assert report.stage_bytes["quantize"] == source - tensors["norm.weight"].nbytes
    assert report.stage_bytes["hash"] == sum(file.size_bytes for file in files)
    assert report.stages.keys() == {"read", "quantize", "write", "hash"}
    assert clock.turn(None) is None, "a run leaves the clock as it found it"


def test_what_a_stopped_run_spent_is_kept_for_the_one_that_goes_on(tmp_path: Path) -> None:
    model = save_folder(tmp_path / "model", {f"l.{i}.weight": normal(256, 512, seed=i) for i in range(6)})
    with pytest.raises(Cancelled):
        run(model, tmp_path / "work", Clock(), tensors=3)
    noted = json.loads((tmp_path / "work" / JOURNAL).read_text().splitlines()[-1])["times"]
    clock = Clock()
    report = run(model, tmp_path / "work", clock)
    assert report.stages["quantize"] > noted["seconds"]["quantize"]
    assert clock.times.seconds["quantize"] - clock.here.seconds["quantize"] == pytest.approx(
        noted["seconds"]["quantize"]
    )
    assert report.stage_bytes["read"] == 6 * 256 * 512 * 4, "each tensor once, whoever read it"


def test_a_run_that_goes_on_with_its_own_clock_counts_nothing_twice(tmp_path: Path) -> None:
    model = save_folder(tmp_path / "model", {f"l.{i}.weight": normal(256, 512, seed=i) for i in range(6)})
    clock = Clock()
    with pytest.raises(Cancelled):
        run(model, tmp_path / "work", clock, tensors=3)
    before = clock.here
    report = run(model, tmp_path / "work", clock)
    assert clock.times == clock.here, "nothing of an earlier process"
    assert report.stages["quantize"] > before.seconds["quantize"]
    assert report.stage_bytes["read"] == 6 * 256 * 512 * 4


def run(model: Path, work: Path, clock: Clock, tensors: int | None = None):
    """Quantize; stop when so many tensors are done."""
    done = 0

    def report(happening: object) -> None:
        nonlocal done
        if isinstance(happening, Progress):
            done = happening.tensors_done

    reader = open_model(model)
    try:
        return quantize(
            make_plan(reader, specs("parquet")),
            reader,
            work,
            backend=ReferenceBackend(),
            block_bytes=1 << 20,
            report=report,
            cancelled=lambda: tensors is not None and done >= tensors,
            clock=clock,
        )
    finally:
        reader.close()
