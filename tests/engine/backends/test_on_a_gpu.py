"""What `make test-gpu` and `make bench-gpu` run, here on fibers, with little to do: only the card is missing."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import tests.gpu.__main__ as on_gpu
from bench import gpu, gpu_card, gpu_peers
from bench.gpu import Sizes
from bench.peers import Peer
from service.engine.backends.cuda import CudaBackend
from service.engine.tensors import Array
from tests.gpu.__main__ import Extent

TINY = Sizes(weights=8 << 10, others=64 << 10, small=1024, many=4, columns=512, launches=1, calls=1)


def sections(page: str) -> dict[str, list[list[str]]]:
    """The cells of each table, by the head of its first column."""
    tables = [part for part in page.split("\n\n") if part.startswith("| ")]
    rows = [[[c.strip() for c in line.strip("|").split("|")] for line in part.splitlines()] for part in tables]
    return {table[0][0]: table[2:] for table in rows}


@pytest.mark.usefixtures("cuda")
def test_the_benchmark_writes_a_page_with_every_rate_share_and_mark(tmp_path: Path) -> None:
    absent = [peer for peer in gpu_peers.GPU_PEERS if peer.package == "bitsandbytes"]
    assert gpu.main(TINY, absent, tmp_path) == 0
    page = (tmp_path / "gpu-fibers-0.md").read_text()
    found = sections(page)
    assert list(found) == ["transfer", "kernel", "pipeline", "small tensors", "others"]
    assert [row[0] for row in found["transfer"]] == ["copy on the card", "pinned upload", "pinned download"]
    assert len(found["kernel"]) == 2 * (6 + 3 + 3)
    assert len(found["pipeline"]) == 2 * 6
    assert {row[4].split()[0] for row in found["kernel"] if "minmax" in row[0] and "small" not in row[0]} == {"0.75"}
    assert {row[4].split()[0] for row in found["pipeline"] if "mse" in row[0]} == {"0.9"}
    assert all(float(row[2]) >= 0 for name in ("kernel", "pipeline") for row in found[name])
    assert [row[2] for row in found["others"]] == ["not here"] * 2
    assert not re.search(r"[{}]", page)


def test_a_mark_is_met_from_it_on() -> None:
    assert [gpu.verdict(share, 0.75) for share in (0.74, 0.75)] == ["0.75 missed", "0.75 met"]
    assert gpu.verdict(0.1, None) == ""


@pytest.mark.filterwarnings("ignore")
def test_peers_that_can_be_imported_are_measured_and_others_are_not_here() -> None:
    pytest.importorskip("torch")
    torch, absent = gpu_peers.GPU_PEERS[0], Peer("nobody's", "nobody", lambda *_: __import__("nobody_has_this"))
    rows = [row[2] for row in gpu.others(TINY, (torch, absent), device="cpu")]
    assert float(rows[0]) > 0
    assert rows[1::2] == ["not here"] * 2


#: What the management library of a card with the counter answers: 3 J more at each call.
COUNTING = """
#include <string.h>
static unsigned long long count = 1000;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char* id, void** card) { *card = &count; return strcmp(id, "0000:00:00.0"); }
int nvmlDeviceGetTotalEnergyConsumption(void* card, unsigned long long* mj) {
    if (card != &count) return 1;
    *mj = count += 3000;
    return 0;
}
"""


@pytest.mark.usefixtures("cuda")
def test_joules_are_those_that_the_driver_counts_where_it_does(tmp_path: Path) -> None:
    library = tmp_path / "libnvidia-ml.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-xc", "-", "-o", str(library)], input=COUNTING.encode(), check=True)
    assert gpu_card.EnergyMeter.of("0000:01:00.0", str(library)) is None, "there is no such card"
    meter = gpu_card.EnergyMeter.of("0000:00:00.0", str(library))
    assert meter is not None
    assert meter.joules() == pytest.approx(7)
    assert meter.joules() == pytest.approx(10)
    calls: list[int] = []
    assert gpu_card.Card(1, str(tmp_path / "none.so")).joules(lambda: calls.append(1)) is None
    assert not calls
    found = gpu_card.Card(1, str(library)).joules(lambda: calls.append(1), least_s=1e-4)
    assert found == pytest.approx(3 / len(calls))


def test_both_refuse_without_a_card_and_say_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main() == on_gpu.main() == 1
    said = capsys.readouterr().err
    assert said.startswith("no GPU to measure: CUDA finds no device")
    assert "no GPU to test on: CUDA finds no device" in said


@pytest.mark.usefixtures("cuda")
def test_every_check_passes_on_a_device_that_computes_well(capsys: pytest.CaptureFixture[str]) -> None:
    some = Extent(((1, 1), (9, 203)), on_gpu.WHOLE.schemes[::11], searched=(4, 256), large=(2048, 1024))
    assert on_gpu.main(some) == 0
    said = capsys.readouterr().out
    assert said.count("passed: ") == len(on_gpu.CHECKS)
    assert "FAILED" not in said


@pytest.mark.usefixtures("cuda")
def test_a_device_that_computes_badly_fails_the_checks(capsys: pytest.CaptureFixture[str]) -> None:
    class Wrong(CudaBackend):
        """Takes the first weight for another."""

        def quantize(self, x: Array, *rest: object) -> object:  # type: ignore[override]
            """See `Backend.quantize`."""
            changed = x.copy()
            changed[0, 0] = 7
            return super().quantize(changed, *rest)  # type: ignore[arg-type]

    assert on_gpu.main(Extent(((9, 203),)), checks=(on_gpu.check_bytes,), device=Wrong) == 1
    assert "FAILED: " in capsys.readouterr().out
