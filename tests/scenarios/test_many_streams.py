"""A short run of what `bench/streams.py` does at length: many readers of many running jobs, some of them bad."""

from __future__ import annotations

from pathlib import Path

from bench.models import equal, write_model
from bench.streams import Case, allow_files, measure


def test_every_reader_hears_every_event_once_whatever_other_readers_do(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    model = write_model(tmp_path / "models" / "model.safetensors", equal(40, (256, 512)), "F32")
    allow_files(1024)
    measured = measure(tmp_path, model, Case("short", 100, deaf=20, resets=20), jobs=10)
    lags = measured.lags_ms
    print(f"lag {lags.median:.1f} ms in the median, {lags.percentile(99):.1f} ms at the 99th percentile")
    # Queued, started and ended beside one for each tensor.
    assert measured.deliveries >= 100 * (40 + 3)
