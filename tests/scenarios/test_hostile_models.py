"""Models, names and labels that mean harm: what they say stays text, and what they claim is not believed."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.conftest import StartServer
from tests.scenarios.conftest import NewModel
from tests.scenarios.test_resources import peak_of
from tests.server import Server, body

MIB = 1 << 20
LAYERS = 100_000
SECRET = b"the contents of a file outside of the root, which nobody may see"
#: What somebody would put into a name to write a header, a line of a log or a colour of their own.
INJECTED = "a\r\nSet-Cookie: x=y\r\n\r\n<script>\n2026-01-01 ERROR forged\x1b[31m"


def write_layers(path: Path, count: int) -> Path:
    """A model of so many tensors of one element."""
    entries = {
        f"layers.{i}": {"dtype": "F32", "shape": [1], "data_offsets": [i, i + 4]} for i in range(0, 4 * count, 4)
    }
    header = json.dumps(entries).encode()
    path.parent.mkdir(parents=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 * count))
    return path


def test_a_model_of_100_000_layers_runs_in_bounded_memory(start_server: StartServer, place: Path) -> None:
    server = start_server()
    model = write_layers(place / "many" / "model.safetensors", LAYERS)
    baseline = server.anonymous_bytes()
    with peak_of(server.anonymous_bytes) as peak:
        plan = server.client.post("/v1/plans", json=body(model, "compressed-tensors"))
        assert plan.status_code == 200
        job = server.run(body(model, "compressed-tensors"))
        assert server.client.get("/healthz").status_code == 200
        page = server.client.get(job["links"]["events"], headers={"Accept": "application/json"}, params={"limit": 200})
        assert len(page.json()["data"]) == 200
    print(f"{(peak[0] - baseline) / MIB:.0f} MiB at most")
    assert peak[0] - baseline < 1500 * MIB
    assert job["progress"]["tensors_done"] == LAYERS


def test_what_labels_and_names_hold_is_never_a_header_or_a_line_of_the_log(server: Server, new_model: NewModel) -> None:
    source = new_model({INJECTED: np.ones((4, 64), np.float32)})
    asked = body(source, "parquet") | {"labels": {"k\r\nX y": INJECTED}}
    response = server.client.post("/v1/jobs", json=asked, headers={"X-Request-ID": "a b\tc"})
    assert response.status_code == 202, response.text
    assert "set-cookie" not in response.headers
    job = server.finish(response.json()["id"])
    assert job["labels"] == asked["labels"]
    for link in job["links"].values():
        answer = server.client.get(link, headers={"Accept": "*/*"})
        assert "set-cookie" not in answer.headers
    for path in (f"/v1/jobs/{job['id']}/artifacts/{INJECTED}", f"/{INJECTED}", f"/v1/jobs?label=a:{INJECTED}"):
        answer = server.client.get(path.replace("\r", "%0d").replace("\n", "%0a").replace("\x1b", "%1b"))
        assert "set-cookie" not in answer.headers
        assert answer.status_code in (200, 404)
    missing = (source.parent / f"x{INJECTED.replace('/', '')}").as_uri()
    assert server.client.post("/v1/jobs", json=asked | {"source": {"type": "uri", "uri": missing}}).status_code == 404
    assert not [line for line in server.log.splitlines() if line.startswith("2026-01-01 ERROR forged")]
    assert "\x1b" not in server.log


@pytest.mark.parametrize(
    "path",
    ["../x", "%2e%2e/x", "..%2fx", "%2e%2e%2f%2e%2e%2fetc/passwd", "/etc/passwd", "%2fetc%2fpasswd", "parquet/../../x",
     "parquet%5c..%5cx", "parquet/%00", "x" * 5000, "CON", "%ff%fe", "parque%CC%81t", "....//x", "parquet/."],
)  # fmt: skip
def test_no_name_of_an_artifact_leads_anywhere_else(server: Server, new_model: NewModel, path: str) -> None:
    job_id = server.run(body(new_model(layers=1), "parquet"))["id"]
    answer = server.client.get(f"{server.base_url.rstrip('/')}/v1/jobs/{job_id}/artifacts/{path}")
    assert answer.status_code == 404, answer.text


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_path_that_changes_between_file_and_link_never_shows_what_lies_outside(
    server: Server, place: Path, tmp_path: Path, what: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    secret = {"secret": np.frombuffer(SECRET, np.uint8)}
    save_file(secret, outside / "model.safetensors")
    (place / "shown").mkdir()
    save_file({"plain": np.zeros(8, np.float32)}, place / "shown" / "model.safetensors")
    inside = place / "shown" / "model.safetensors" if what == "file" else place / "shown"
    target = outside / "model.safetensors" if what == "file" else outside
    kept = inside.with_name(f"{inside.name}.kept")
    done = threading.Event()

    def swap() -> None:
        inside.rename(kept)
        while not done.is_set():
            kept.rename(inside)
            inside.rename(kept)
            inside.symlink_to(target)
            inside.unlink()
        kept.rename(inside)

    thread = threading.Thread(target=swap)
    thread.start()
    answers: dict[int, int] = {}
    try:
        for _ in range(300):
            answer = server.client.post("/v1/plans", json=body(place / "shown", "parquet"))
            answers[answer.status_code] = answers.get(answer.status_code, 0) + 1
            assert "secret" not in answer.text, answer.text
    finally:
        done.set()
        thread.join()
    print(answers)
    assert set(answers) <= {200, 403, 404, 409, 422}, answers
