"""Progress as one number."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.engine.meter import Meter
from service.engine.progress import Progress


@given(st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 3)), max_size=20))
def test_the_fraction_never_falls_nor_leaves_the_open_interval(tensors: list[tuple[int, int]]) -> None:
    seen: list[Progress] = []
    meter = Meter(
        lambda h: seen.append(h) if isinstance(h, Progress) else None, len(tensors), sum(n for n, _ in tensors)
    )
    meter.start("quantizing")
    for nbytes, attempts in tensors:
        for _ in range(attempts):
            meter.within_tensor(nbytes // 2)
            meter.within_tensor(nbytes)
        meter.tensors_done(1, nbytes)
    for stage in ("writing", "hashing", "writing", "hashing"):
        advance = meter.finishing(stage, 10)
        advance(10)
        advance(10)
    fractions = [p.fraction for p in seen]
    assert fractions == sorted(fractions)
    assert all(0 < f < 1 for f in fractions)
    assert [p.bytes_done for p in seen] == sorted(p.bytes_done for p in seen)
    assert seen[-1].tensors_done == len(tensors)
