"""The commands as a user runs them: real processes, a real server, real files."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.server import Server, body

ARROWQUANT = (sys.executable, "-m", "service")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
SLOW = ("--backend", "reference", "--method", "mse", "--block-bytes", "65536")


@pytest.fixture(scope="module")
def models(model_root: Path) -> Path:
    """A folder with a small model and a large one, where the shared server may read."""
    root = model_root / "cli"
    root.mkdir()
    make_model(root / "small", tensors=8, rows=256)
    make_model(root / "large", tensors=64, rows=1024)
    return root


def make_model(folder: Path, *, tensors: int, rows: int) -> None:
    """Normal weights, seed 7, rows of 512."""
    folder.mkdir()
    random = np.random.default_rng(7)
    weights = {f"blocks.{i}.weight": random.standard_normal((rows, 512), np.float32) for i in range(tensors)}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "bert"}')


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A command to its end, its output in pipes."""
    return subprocess.run([*ARROWQUANT, *map(str, arguments)], capture_output=True, text=True, check=False)


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """A command, going on."""
    # A shell that starts the tests in the background has them ignore SIGINT, and children inherit that.
    command = ["env", "--default-signal=INT", *ARROWQUANT, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """Lines of stderr up to the first one that matches."""
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if re.search(pattern, line):
            return seen
    raise AssertionError(f"{pattern!r} never came, but:\n{seen}")


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_help_loads_neither_engine_nor_web_framework() -> None:
    heavy = {"numba", "numpy", "pyarrow", "fastapi", "pydantic", "httpx"}
    code = f"import sys, service.__main__; sys.exit(bool(sys.modules.keys() & {heavy!r}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    asked = run("--help")
    assert asked.returncode == 0
    assert {"serve", "quantize", "validate", "watch", "cancel", "jobs"} <= set(asked.stdout.split())


def test_quantize_in_the_process_writes_a_folder_for_each_format(models: Path, tmp_path: Path) -> None:
    formats = ("--format", "compressed-tensors", "--format", "parquet")
    done = run("quantize", models / "small", "--bits", "4", *formats, "--out", tmp_path / "new" / "out")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "new" / "out"
    assert {p.name for p in out.iterdir()} == {"compressed-tensors", "parquet", "report.json", "report.html"}
    assert json.loads((out / "report.json").read_text())["passed"]
    assert "compressed-tensors, cosine similarity 0.99" in done.stdout
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_output_in_a_pipe_is_plain_lines(models: Path, tmp_path: Path) -> None:
    done = run("quantize", models / "small", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert not CONTROL.search(done.stdout + done.stderr)
    assert "quantizing" in done.stderr
    assert "quantizing" not in done.stdout


def test_a_terminal_gets_a_bar(models: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [*ARROWQUANT, "quantize", str(models / "small"), "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        shown = read_terminal(ours)
    os.close(ours)
    assert process.returncode == 0
    assert "\x1b[" in shown
    assert "━" in shown


def read_terminal(descriptor: int) -> str:
    """All that is written to a terminal until the other side is closed."""
    shown = b""
    try:
        while chunk := os.read(descriptor, 65536):
            shown += chunk
    except OSError:  # Linux reports the closed side so.
        pass
    return shown.decode()


def test_json_is_one_document_on_stdout(models: Path, tmp_path: Path) -> None:
    done = run("quantize", models / "small", "--bits", "8", "--out", tmp_path / "out", "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["status"]) == (0, "succeeded")
    assert document["result"]["bit_width"] == 8
    assert document["result"]["passed"]
    assert document["out"] == str(tmp_path / "out")


def test_a_server_writes_the_same_bytes_as_this_process(models: Path, server: Server, tmp_path: Path) -> None:
    wish = ("quantize", models / "small", "--bits", "3", "--group-size", "64", "--symmetric", "--format", "parquet")
    here = run(*wish, "--out", tmp_path / "here")
    there = run(*wish, "--out", tmp_path / "there", "--server", server.base_url)
    assert here.returncode == 0, here.stderr
    assert there.returncode == 0, there.stderr
    assert not CONTROL.search(there.stdout + there.stderr)
    assert hashes(tmp_path / "here" / "parquet") == hashes(tmp_path / "there" / "parquet")


def test_validate_measures_what_quantize_reported(models: Path, server: Server) -> None:
    out = models / "quantized"
    quantized = json.loads(run("quantize", models / "small", "--out", out, "--json").stdout)
    similarity = quantized["result"]["cosine_similarity"]
    for where in ((), ("--server", server.base_url)):
        done = run("validate", models / "small", out / "compressed-tensors", *where, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["result"]["cosine_similarity"] == pytest.approx(similarity, abs=1e-6)


def test_validate_fails_below_the_accuracy_asked_for(models: Path, tmp_path: Path) -> None:
    run("quantize", models / "small", "--bits", "2", "--on-failure", "warn", "--out", tmp_path / "out")
    done = run("validate", models / "small", tmp_path / "out" / "compressed-tensors", "--min-accuracy", "0.9999")
    assert done.returncode == 1
    assert "accuracy_too_low" in done.stderr


@pytest.mark.parametrize("where", ["here", "there"])
def test_quantize_below_the_accuracy_asked_for_writes_and_ends_with_status_1(
    where: str, models: Path, server: Server, tmp_path: Path
) -> None:
    remote = ("--server", server.base_url) if where == "there" else ()
    wish = ("quantize", models / "small", "--bits", "2", "--min-accuracy", "0.9999", "--on-failure", "warn", *remote)
    done = run(*wish, "--out", tmp_path / "text")
    assert done.returncode == 1
    assert "below min_accuracy" in done.stdout
    assert "[accuracy_too_low]" in done.stderr
    assert "warning: blocks.0.weight in compressed-tensors: cosine similarity" in done.stderr
    done = run(*wish, "--out", tmp_path / "json", "--json")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert (document["result"]["passed"], document["out"]) == (False, str(tmp_path / "json"))
    for name in ("text", "json"):
        assert (tmp_path / name / "compressed-tensors" / "model.safetensors").exists()


def test_watch_ends_with_status_1_when_the_job_is_below_its_accuracy(models: Path, server: Server) -> None:
    asked = body(models / "small", "parquet", bit_width=2, min_accuracy=0.9999, on_failure="warn")
    done = run("watch", server.run(asked)["id"], "--server", server.base_url)
    assert done.returncode == 1
    assert "[accuracy_too_low]" in done.stderr


def test_a_file_address_is_decoded(models: Path, tmp_path: Path) -> None:
    make_model(models / "with a space", tensors=1, rows=16)
    address = (models / "with a space").as_uri()
    assert "%20" in address
    assert run("quantize", address, "--out", tmp_path / "out").returncode == 0
    weights = f"{address}/model.safetensors"
    assert run("validate", weights, (tmp_path / "out" / "compressed-tensors").as_uri()).returncode == 0
    other = run("quantize", "hf://owner/name", "--out", tmp_path / "other")
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "hf:// is not on this machine" in other.stderr


@pytest.mark.parametrize("option", [("--threads", "2"), ("--block-bytes", "65536")])
def test_what_only_this_process_can_heed_is_refused_with_a_server(
    option: tuple[str, str], models: Path, server: Server, tmp_path: Path
) -> None:
    for command in (("quantize", models / "small", "--out", tmp_path / "out"), ("validate", models, models)):
        done = run(*command, "--server", server.base_url, *option)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert option[0] in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_reader_that_goes_away_ends_a_list_without_a_word(
    form: tuple[str, ...], models: Path, server: Server
) -> None:
    server.run(body(models / "small", "parquet"))
    with start("jobs", "--server", server.base_url, *form) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert (process.stderr.read(), process.wait()) == ("", 141)


def test_a_reader_of_progress_that_goes_away_stops_nothing(models: Path, tmp_path: Path) -> None:
    with start("quantize", models / "small", "--out", tmp_path / "out", "--backend", "reference") as process:
        read_until(process, "quantizing")
        assert process.stderr is not None
        process.stderr.close()
        assert process.stdout is not None
        assert "cosine similarity" in process.stdout.read()
        assert process.wait() == 0
    assert (tmp_path / "out" / "report.json").exists()
    assert "Error by layer" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("where", ["here", "there"])
def test_a_value_out_of_range_is_a_usage_error_in_one_line(
    where: str, models: Path, server: Server, tmp_path: Path
) -> None:
    remote = ("--server", server.base_url) if where == "there" else ()
    done = run("quantize", models / "small", "--bits", "7", "--out", tmp_path / "out", *remote)
    assert done.returncode == 2
    assert "bit_width" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_is_a_usage_error() -> None:
    assert run("quantize", "--no-such-option").returncode == 2


@pytest.mark.parametrize("where", ["here", "there"])
def test_a_missing_model_is_named(where: str, models: Path, server: Server, tmp_path: Path) -> None:
    remote = ("--server", server.base_url) if where == "there" else ()
    done = run("quantize", models / "nowhere", "--out", tmp_path / "out", "--json", *remote)
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "model_not_found"
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_fails_ends_with_status_1_and_its_reason(models: Path, server: Server, tmp_path: Path) -> None:
    wish = ("quantize", models / "small", "--bits", "2", "--min-accuracy", "0.999", "--on-failure", "fail")
    for where in ((), ("--server", server.base_url)):
        done = run(*wish, "--out", tmp_path / "out", *where)
        assert done.returncode == 1
        assert "blocks.0.weight" in done.stderr
        assert "[accuracy_too_low]" in done.stderr
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_files_is_left_alone(models: Path, server: Server, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for where in ((), ("--server", server.base_url)):
        done = run("quantize", models / "small", "--out", tmp_path, *where)
        assert done.returncode == 1
        assert "[target_in_use]" in done.stderr
        assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_ctrl_c_in_the_process_leaves_nothing_behind(models: Path, tmp_path: Path) -> None:
    process = start("quantize", models / "large", "--out", tmp_path / "out", *SLOW)
    read_until(process, "quantizing")
    assert list(tmp_path.iterdir()), "the work folder lies beside the target"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_cancels_the_job_on_the_server(models: Path, server: Server, tmp_path: Path) -> None:
    process = start("quantize", models / "large", "--out", tmp_path / "out", "--server", server.base_url, *SLOW[:4])
    begun = read_until(process, "quantizing")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert "is cancelled" in stderr
    job_id = re.search(r"job_\S+", begun)
    assert job_id is not None
    assert httpx.get(f"{server.base_url}/v1/jobs/{job_id[0]}").json()["status"] == "cancelled"
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_restarts_does_not_end_the_command(
    models: Path, start_server: Callable[..., Server], tmp_path: Path
) -> None:
    server = start_server(data_dir=tmp_path / "data")
    port = str(server.client.base_url.port)
    wish = ("quantize", models / "large", "--backend", "reference", "--method", "minmax", "--format", "parquet")
    process = start(*wish, "--out", tmp_path / "out", "--server", server.base_url)
    read_until(process, r" [1-9]\d* of 64 tensors")
    server.stop()
    again = start("serve", "--port", port, "--data-dir", tmp_path / "data", "--model-root", models)
    _, stderr = process.communicate()
    again.terminate()
    again.communicate()
    assert process.returncode == 0, stderr
    assert (tmp_path / "out" / "parquet" / "manifest.json").exists()


def test_watch_tells_a_finished_job_again(models: Path, server: Server) -> None:
    body = {
        "kind": "quantize",
        "source": {"type": "uri", "uri": (models / "small").as_uri()},
        "outputs": [{"format": "parquet"}],
    }
    job = httpx.post(f"{server.base_url}/v1/jobs", json=body, headers={"Prefer": "wait=60"}, timeout=90).json()
    done = run("watch", job["id"], "--server", server.base_url, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["id"] == job["id"]
    assert "parquet, cosine similarity" in run("watch", job["id"], "--server", server.base_url).stdout


def test_jobs_lists_and_cancel_cancels(models: Path, server: Server) -> None:
    body = {
        "kind": "quantize",
        "source": {"type": "uri", "uri": (models / "large").as_uri()},
        "config": {"backend": "reference", "method": "mse"},
        "outputs": [{"format": "parquet"}],
    }
    job_id = httpx.post(f"{server.base_url}/v1/jobs", json=body).json()["id"]
    watcher = start("watch", job_id, "--server", server.base_url)
    assert job_id in run("jobs", "--server", server.base_url).stdout
    cancelled = run("cancel", job_id, "--server", server.base_url)
    assert (cancelled.returncode, cancelled.stdout) == (0, f"{job_id} cancelled\n")
    assert run("cancel", job_id, "--server", server.base_url).returncode == 0, "cancelling again is harmless"
    watcher.communicate()
    assert watcher.returncode == 1, "the job that was watched did not succeed"
    listed = json.loads(run("jobs", "--status", "cancelled", "--server", server.base_url, "--json").stdout)
    assert job_id in [job["id"] for job in listed]


def test_an_unknown_job_is_one_clear_line(server: Server) -> None:
    for command in ("watch", "cancel"):
        done = run(command, "job_none", "--server", server.base_url)
        assert done.returncode == 1
        assert "[not_found]" in done.stderr
        assert done.stderr.count("\n") == 1


def test_no_server_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    done = run("jobs", "--server", url)
    assert done.returncode == 1
    assert done.stderr.startswith(f"arrowquant: no answer from {url}")
    assert done.stderr.count("\n") == 1
