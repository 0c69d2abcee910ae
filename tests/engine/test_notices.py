"""What a run tells its user says what it is about."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from service.engine.progress import Happening, Notice
from tests.engine.helpers import normal, run, save, specs


def test_a_notice_names_the_tensor_and_the_output_it_is_about() -> None:
    assert Notice("source", "one file is left out").sentence == "one file is left out"
    assert Notice("copy_differs", "its bytes differ", "a.weight").sentence == "a.weight: its bytes differ"
    assert Notice("fallback_taken", "int3 instead", "a.weight", "q2").sentence == "a.weight in q2: int3 instead"


def test_every_warning_of_a_tensor_says_which_output_it_is_in(tmp_path: Path) -> None:
    sick = normal(64, 160)
    sick[3, 3] = np.nan
    source = save(tmp_path / "m.safetensors", {"fine.weight": normal(64, 160), "sick.weight": sick})
    seen: list[Happening] = []
    asked = specs("compressed-tensors", "parquet", bit_width=2, min_accuracy=0.99, on_non_finite="copy")
    report = run(source, tmp_path / "work", asked, happenings=seen)
    notices = [h for h in seen if isinstance(h, Notice)]
    assert {n.code for n in notices} == {"group_size_changed", "non_finite_copied", "fallback_taken"}
    # Only compressed-tensors needs another group size here; the rest concerns both outputs.
    assert {n.output for n in notices if n.code == "group_size_changed"} == {"compressed-tensors"}
    for code in ("non_finite_copied", "fallback_taken"):
        assert {n.output for n in notices if n.code == code} == {"compressed-tensors", "parquet"}
    assert report.warnings == tuple(n.sentence for n in notices)
    assert all(text.startswith(f"{n.tensor} in {n.output}: ") for n, text in zip(notices, report.warnings, strict=True))
