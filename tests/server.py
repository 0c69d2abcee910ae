"""A server process of its own on real files, and the calls that a client makes to it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
from httpx_sse import connect_sse

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
ADDRESS = re.compile(r"http://(?:127|0)\.0\.0\.[01]:(\d+)")
#: Generous: these end what hangs, they measure nothing.
START_S = 60.0
STOP_S = 60.0
JOB_S = 180.0

Json = dict[str, Any]


def body(source: Path | Json, *outputs: str | Json, profile: str | None = None, **config: Any) -> Json:
    """A job that quantizes: a path or a source object, formats or output objects, and the configuration's fields."""
    asked: Json = {
        "kind": "quantize",
        "source": uri(source) if isinstance(source, Path) else source,
        "outputs": [{"format": o} if isinstance(o, str) else o for o in outputs],
    }
    if profile is not None:
        asked["profile"] = profile
    return asked | ({"config": config} if config else {})


def validation(original: Path | Json, quantized: Path | Json, **config: Any) -> Json:
    """A job that compares two models."""
    sources = [uri(s) if isinstance(s, Path) else s for s in (original, quantized)]
    asked: Json = {"kind": "validate", "original": sources[0], "quantized": sources[1]}
    return asked | ({"config": config} if config else {})


def wait_until(holds: Callable[[], object]) -> None:
    """Wait for what nobody tells, such as a file that goes; fails when it takes too long."""
    deadline = time.monotonic() + JOB_S
    while not holds():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)


def uri(path: Path) -> Json:
    """A path as a source."""
    return {"type": "uri", "uri": path.as_uri()}


class Server:
    """`arrowquant serve` in a process; a fresh start on the same `data_dir` goes on where the last one ended.

    `settings` become the server's environment: `max_running_jobs=1` is ARROWQUANT_MAX_RUNNING_JOBS.
    """

    def __init__(
        self,
        data_dir: Path,
        roots: Sequence[Path],
        *,
        log_path: Path | None = None,
        prefix: Sequence[str] = (),
        **settings: object,
    ) -> None:
        """`prefix` is a command that executes the server's in its own place, such as `unshare`."""
        self.data_dir = data_dir
        self.log_path = log_path or data_dir.with_name(f"{data_dir.name}.log")
        self._roots = roots
        self._prefix = prefix
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self.client = httpx.Client()

    def start(self) -> Self:
        """Start the process and wait until it is ready."""
        serve = [sys.executable, "-m", "service", "serve"]
        command = [*self._prefix, *serve, "--port", "0", "--data-dir", str(self.data_dir)]
        for root in self._roots:
            command += ["--model-root", str(root)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ARROWQUANT_")}
        environment |= {f"ARROWQUANT_{name.upper()}": str(value) for name, value in self._settings.items()}
        with self.log_path.open("ab") as log:
            start = log.tell()
            # A group of its own: a kill then takes whatever it has started as well.
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, process_group=0)
        try:
            port = self._wait_for_port(start)
            self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=90.0)
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def stop(self) -> float:
        """SIGTERM, as an operator's `stop`; the seconds it took. The exit status has to be 0."""
        begun = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(STOP_S)
        self._forget()
        assert status == 0, f"the server ended with {status}:\n{self.log_end}"
        return time.monotonic() - begun

    def kill(self) -> None:
        """SIGKILL, as the kernel does when memory is short."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait(STOP_S)
        self._forget()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process; it must have been started."""
        assert self._process is not None, "start() comes first"
        return self._process

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def base_url(self) -> str:
        """Where it listens."""
        return str(self.client.base_url)

    @property
    def log(self) -> str:
        """What it has written so far, over all its starts."""
        return self.log_path.read_text(errors="replace")

    @property
    def log_end(self) -> str:
        """The end of it, for messages."""
        return self.log[-4000:]

    # What a client does

    def submit(self, asked: Json) -> Json:
        """Create a job; the answer."""
        response = self.client.post("/v1/jobs", json=asked)
        assert response.status_code == 202, response.text
        job: Json = response.json()
        return job

    def job(self, job_id: str, wait_s: int = 0) -> Json:
        """The job as it is now, or when it has ended, or after `wait_s`."""
        headers = {"Prefer": f"wait={wait_s}"} if wait_s else {}
        response = self.client.get(f"/v1/jobs/{job_id}", headers=headers)
        assert response.status_code == 200, response.text
        job: Json = response.json()
        return job

    def finish(self, job_id: str) -> Json:
        """The job when it has ended, however that was."""
        deadline = time.monotonic() + JOB_S
        while (job := self.job(job_id, wait_s=30))["status"] not in TERMINAL:
            assert time.monotonic() < deadline, f"{job_id} does not end: {job}\n{self.log_end}"
        return job

    def run(self, asked: Json) -> Json:
        """Create a job and wait for its success."""
        job = self.finish(self.submit(asked)["id"])
        assert job["status"] == "succeeded", f"{job.get('error')}\n{self.log_end}"
        return job

    def fail(self, asked: Json) -> Json:
        """Create a job and wait for its failure; the problem."""
        job = self.finish(self.submit(asked)["id"])
        assert job["status"] == "failed", job
        problem: Json = job["error"]
        return problem

    def cancel(self, job_id: str) -> httpx.Response:
        """DELETE."""
        return self.client.delete(f"/v1/jobs/{job_id}")

    @contextmanager
    def stream(self, job_id: str, last_event_id: int | None = None) -> Iterator[Iterator[Json]]:
        """The events of a job as they come: their data, after a look whether the frame says the same."""
        headers = {} if last_event_id is None else {"Last-Event-ID": str(last_event_id)}
        with (
            httpx.Client(base_url=self.base_url, timeout=httpx.Timeout(90.0)) as client,
            connect_sse(client, "GET", f"/v1/jobs/{job_id}/events", headers=headers) as source,
        ):
            source.response.raise_for_status()
            yield _events(source.iter_sse())

    def follow(self, job_id: str, last_event_id: int | None = None) -> list[Json]:
        """All events until the stream ends."""
        with self.stream(job_id, last_event_id) as events:
            return list(events)

    def wait_for(self, job_id: str, type_: str, count: int = 1) -> list[Json]:
        """The events up to the `count`-th of this type; the job must not end before."""
        seen: list[Json] = []
        with self.stream(job_id) as events:
            for event in events:
                seen.append(event)
                count -= event["type"] == type_
                if not count:
                    return seen
        raise AssertionError(f"{job_id} ended before {type_}: {seen[-1]}\n{self.log_end}")

    def report(self, job_id: str) -> Json:
        """The quality report."""
        response = self.client.get(f"/v1/jobs/{job_id}/report")
        assert response.status_code == 200, response.text
        report: Json = response.json()
        return report

    def artifacts(self, job_id: str) -> list[Json]:
        """What the job wrote."""
        response = self.client.get(f"/v1/jobs/{job_id}/artifacts", params={"limit": 200})
        assert response.status_code == 200, response.text
        page: Json = response.json()
        assert "next_cursor" not in page, "more files than a page holds"
        return list(page["data"])

    def artifact(self, job_id: str, path: str) -> bytes:
        """One file."""
        response = self.client.get(f"/v1/jobs/{job_id}/artifacts/{path}")
        assert response.status_code == 200, response.text
        return response.content

    def files(self, job_id: str) -> dict[str, bytes]:
        """Every file, its size and hash compared with what was announced."""
        found: dict[str, bytes] = {}
        for entry in self.artifacts(job_id):
            content = self.artifact(job_id, entry["path"])
            assert len(content) == entry["size_bytes"], entry
            assert hashlib.sha256(content).hexdigest() == entry["sha256"], entry
            found[entry["path"]] = content
        return found

    def download(self, job_id: str, folder: Path) -> Path:
        """Every file below `folder`; that folder."""
        for path, content in self.files(job_id).items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return folder

    # What an operator sees

    def leftovers(self, job_id: str) -> list[Path]:
        """What lies in the data folder under the job's id."""
        return sorted(p for p in self.data_dir.rglob("*") if job_id in p.name)

    def anonymous_bytes(self) -> int:
        """RssAnon: memory that is the process's own, mapped files left out."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024  # type: ignore[index]

    def open_files(self) -> int:
        """Descriptors, connections included."""
        return psutil.Process(self.pid).num_fds()

    def threads(self) -> int:
        """Threads of the process."""
        return psutil.Process(self.pid).num_threads()

    def io(self) -> dict[str, int]:
        """`rchar` and `wchar`, bytes read and written by system calls, and what else the kernel counts."""
        lines = Path(f"/proc/{self.pid}/io").read_text().splitlines()
        return {name: int(value) for name, _, value in (line.partition(": ") for line in lines)}

    def _wait_for_port(self, start: int) -> int:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.is_running:
            if found := ADDRESS.search(self.log_path.read_bytes()[start:].decode(errors="replace")):
                return int(found[1])
            time.sleep(0.02)
        raise AssertionError(f"the server did not start:\n{self.log_end}")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                response = self.client.get("/readyz")
            except httpx.TransportError:
                pass
            else:
                if response.status_code == 200:
                    return
                assert response.status_code == 503, f"{response.text}\n{self.log_end}"
            assert self.is_running, f"the server has ended:\n{self.log_end}"
            assert time.monotonic() < deadline, f"the server is not ready:\n{self.log_end}"
            time.sleep(0.02)

    def _forget(self) -> None:
        self.client.close()
        self._process = None


def _events(frames: Iterator[Any]) -> Iterator[Json]:
    for frame in frames:
        if not frame.data:
            continue
        event: Json = json.loads(frame.data)
        assert event["type"] == frame.event, frame
        assert "id" not in event or str(event["id"]) == frame.id, frame
        yield event
