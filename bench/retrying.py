"""A client that sends a call again until it is answered, whatever becomes of the server meanwhile."""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from httpx_sse import SSEError, connect_sse

Json = dict[str, Any]
PAUSE_S = 0.02
#: What a restarting server says, and what says that an earlier attempt is still at work.
AGAIN = frozenset({503, 429})
PIECE_BYTES = 1 << 20


class Stopped(Exception):
    """The run is over: no server will come back."""


class Calls:
    """Which calls are under way, by kind; others can wait for the next one. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._begun: Counter[str] = Counter()
        self._under_way: Counter[str] = Counter()

    @contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """One call, for as long as it takes, attempts included."""
        with self._changed:
            self._begun[kind] += 1
            self._under_way[kind] += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._under_way[kind] -= 1

    def wait_for_next(self, kind: str, timeout_s: float) -> bool:
        """Whether a call of the kind began in time."""
        with self._changed:
            before = self._begun[kind]
            return self._changed.wait_for(lambda: self._begun[kind] > before, timeout_s)

    def under_way(self) -> list[str]:
        """The kinds of the calls that have begun and have not been answered."""
        with self._changed:
            return [kind for kind, count in self._under_way.items() if count > 0]


class Retrying:
    """One client; `where` says at which address the server is now."""

    def __init__(self, where: Callable[[], str], calls: Calls, stop: threading.Event) -> None:
        self._where = where
        self._calls = calls
        self._stop = stop
        self._http = httpx.Client(timeout=30.0)

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def call(
        self, kind: str, method: str, path: str, *, accepted: Collection[int], repeat: Collection[int] = (), **sent: Any
    ) -> httpx.Response:
        """The answer to a call, which is sent again while nobody answers; raises AssertionError for a wrong status.

        `repeat` are further statuses to try again on.
        """
        with self._calls.of(kind):
            while True:
                self._check()
                try:
                    response = self._http.request(method, self._where() + path, **sent)
                except httpx.TransportError:
                    time.sleep(PAUSE_S)
                    continue
                if response.status_code in accepted:
                    return response
                if response.status_code not in AGAIN and response.status_code not in repeat:
                    raise AssertionError(f"{method} {path} was answered {response.status_code}: {response.text}")
                time.sleep(PAUSE_S)

    def create(self, path: str, body: Json) -> Json:
        """POST with a key of its own; the answer."""
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        # The first attempt may still be at work where its connection was lost: then 409.
        answer = self.call("POST", "POST", path, json=body, headers=headers, accepted={202}, repeat={409})
        return dict(answer.json())

    def job(self, job_id: str) -> Json:
        """The job as it is."""
        return dict(self.call("GET", "GET", f"/v1/jobs/{job_id}", accepted={200}).json())

    def cancel(self, job_id: str) -> str:
        """DELETE; the status that the answer shows."""
        answer = self.call("DELETE", "DELETE", f"/v1/jobs/{job_id}", accepted={200, 202})
        return str(answer.json()["status"])

    def purge(self, job_id: str) -> None:
        """Delete an ended job. 404 is what a second attempt gets."""
        self.call("purge", "DELETE", f"/v1/jobs/{job_id}?purge=true", accepted={204, 404})

    def follow(self, job_id: str) -> list[tuple[int, str]]:
        """Ids and types of all events but progress until the job has ended, taken up again after each cut."""
        seen: list[tuple[int, str]] = []
        last = 0
        while not (seen and seen[-1][1] in ("job.succeeded", "job.failed", "job.cancelled")):
            self._check()
            headers = {"Last-Event-ID": str(last)}
            try:
                with connect_sse(
                    self._http, "GET", f"{self._where()}/v1/jobs/{job_id}/events", headers=headers
                ) as source:
                    if source.response.status_code in AGAIN:
                        time.sleep(PAUSE_S)
                        continue
                    assert source.response.status_code == 200, f"{job_id}: {source.response.status_code} after {seen}"
                    for event in source.iter_sse():
                        if event.id and event.event != "job.progress":
                            seen.append((int(event.id), event.event))
                        last = int(event.id or last)
            except (httpx.TransportError, SSEError):
                time.sleep(PAUSE_S)
        return seen

    def upload(self, digest: str, data: bytes, pace_s: float) -> None:
        """Send a blob in pieces, each behind what has arrived, with a pause before each; whole at the end."""
        path, size = f"/v1/blobs/sha256:{digest}", len(data)
        with self._calls.of("PUT"):
            while True:
                head = self.call("HEAD", "HEAD", path, accepted={200, 404})
                if head.status_code == 200:
                    return
                offset = int(head.headers.get("upload-offset", 0))
                span = f"bytes {offset}-{size - 1}/{size}" if offset < size else f"bytes */{size}"
                headers = {"Content-Range": span, "Content-Length": str(size - offset)}
                try:
                    answer = self._http.put(
                        self._where() + path, content=_paced(data[offset:], pace_s), headers=headers
                    )
                except httpx.TransportError:
                    time.sleep(PAUSE_S)
                    continue
                # 409: the attempt that was cut is still being put away.
                assert answer.status_code in {200, 201, 202, 409, *AGAIN}, f"{answer.status_code}: {answer.text}"

    def files(self, job_id: str) -> dict[str, str]:
        """SHA-256 by path as announced."""
        path = f"/v1/jobs/{job_id}/artifacts?limit=200"
        entries = self.call("GET", "GET", path, accepted={200}).json()["data"]
        return {entry["path"]: entry["sha256"] for entry in entries}

    def jobs(self) -> list[Json]:
        """All jobs there are."""
        found: list[Json] = []
        after = ""
        while True:
            page = self.call("GET", "GET", f"/v1/jobs?limit=200{after}", accepted={200}).json()
            found += page["data"]
            if "next_cursor" not in page:
                return found
            after = f"&after={page['next_cursor']}"

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped


def _paced(data: bytes, pace_s: float) -> Iterator[bytes]:
    for start in range(0, len(data), PIECE_BYTES):
        time.sleep(pace_s)
        yield data[start : start + PIECE_BYTES]


def wait_for_file(folder: Path, patterns: Sequence[str], timeout_s: float) -> bool:
    """Whether a file that fits one of the patterns was there in time; looks all the time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError):  # a folder that went while it was looked into
            if any(next(folder.glob(pattern), None) is not None for pattern in patterns):
                return True
        time.sleep(0.001)
    return False
