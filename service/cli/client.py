"""The HTTP API as a command sees it: calls that answer or raise Failed, and an event stream that survives a cut."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx
from httpx_sse import ServerSentEvent, SSEError, connect_sse

from service.cli.outcome import FAILED, USAGE, USAGE_CODES, Failed

TERMINAL = {"succeeded", "failed", "cancelled"}
#: Between two comments of a living stream lie 15 s.
STREAM_SILENCE_S = 45.0
#: With the growing pauses between them, about a minute.
RECONNECTS = 20
WAIT_S = 30
#: Sent at once of a file.
CHUNK_BYTES = 1 << 20
#: A large file is synced before the answer.
UPLOAD_ANSWER_S = 600.0
#: What an upload that is tried again may not meet again.
PASSING_CODES = {"server_unreachable", "upload_in_progress", "upload_offset_mismatch", "body_too_slow", "draining"}


class Server:
    """A service at an address. Every call raises Failed when it is refused or gets no answer."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        timeout = httpx.Timeout(30.0, read=WAIT_S + 15.0)
        self._http = httpx.Client(base_url=self.url, timeout=timeout, headers=_authorization(api_key))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def submit(self, body: dict[str, Any]) -> dict[str, Any]:
        """Create one job, however often the answer is lost: under the same key the call is carried out once."""
        headers, lost, failures = {"Idempotency-Key": str(uuid.uuid4())}, False, 0
        while True:
            try:
                return self._json("POST", "/v1/jobs", json=body, headers=headers)
            except Failed as error:
                lost = lost or isinstance(error, Lost)
                is_passing = isinstance(error, Unreachable) or error.problem.get("code") == "idempotency_key_in_flight"
                if not (lost and is_passing) or failures >= RECONNECTS:
                    raise
            failures += 1
            time.sleep(min(0.1 * 2**failures, 3.0))

    def job(self, job_id: str, *, wait_s: int = 0) -> dict[str, Any]:
        """The job; with `wait_s` as soon as it has ended, or after that time."""
        headers = {"Prefer": f"wait={wait_s}"} if wait_s else {}
        return self._json("GET", f"/v1/jobs/{quote(job_id, safe='')}", headers=headers)

    def jobs(self, *, status: str | None, limit: int) -> list[dict[str, Any]]:
        """The newest jobs."""
        params: dict[str, str | int] = {"limit": limit} | ({"status": status} if status else {})
        return list(self._json("GET", "/v1/jobs", params=params)["data"])

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancel, and wait until the job has ended one way or another."""
        job = self._json("DELETE", f"/v1/jobs/{quote(job_id, safe='')}")
        while job["status"] not in TERMINAL:
            job = self.job(job_id, wait_s=WAIT_S)
        return job

    def report(self, job_id: str) -> dict[str, Any]:
        """The quality report."""
        return self._json("GET", f"/v1/jobs/{job_id}/report")

    def report_page(self, job_id: str) -> str:
        """The quality report as a page."""
        with self._reaching():
            response = self._http.get(f"/v1/jobs/{job_id}/report", headers={"Accept": "text/html"})
            _check(response)
            return response.text

    def artifacts(self, job_id: str) -> list[dict[str, Any]]:
        """Every file that the job wrote."""
        files: list[dict[str, Any]] = []
        params: dict[str, str | int] = {"limit": 200}
        while True:
            page = self._json("GET", f"/v1/jobs/{job_id}/artifacts", params=params)
            files += page["data"]
            if "next_cursor" not in page:
                return files
            params["after"] = page["next_cursor"]

    def collect_garbage(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Have what is kept no longer removed; of a large data folder that takes minutes."""
        return self._json("POST", "/v1/gc", json=asked, timeout=httpx.Timeout(30.0, read=None))

    def download(self, job_id: str, artifact: dict[str, Any], target: Path) -> None:
        """Fetch a file, and compare its SHA-256 with the one announced."""
        digest = hashlib.sha256()
        address = f"/v1/jobs/{job_id}/artifacts/{quote(artifact['path'])}"
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._reaching(), self._http.stream("GET", address) as response, target.open("wb") as file:
            _check(response)
            for chunk in response.iter_bytes(1 << 20):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != artifact["sha256"]:
            raise Failed({"code": "hash_differs", "detail": f"{artifact['path']} arrived with another SHA-256"})

    def upload(self, path: Path, digest: str, sent: Callable[[int, int], None]) -> None:
        """Send a file, or what the service lacks of it; an upload that is cut is taken up where it was.

        `sent` is told how far it is, and how many bytes just went.
        """
        size, reached, failures = path.stat().st_size, 0, 0
        while True:
            try:
                offset = self._uploaded(digest)
                if offset is None:
                    break
                if offset > reached:
                    reached, failures = offset, 0
                sent(offset, 0)
                self._put(path, digest, offset, size, sent)
            except Failed as failure:
                failures += 1
                if failure.problem.get("code") not in PASSING_CODES or failures > RECONNECTS:
                    raise
                time.sleep(min(0.1 * 2**failures, 3.0))
        sent(size, 0)

    def follow(self, job_id: str) -> Iterator[ServerSentEvent]:
        """The events of a job from the first to the last; a stream that breaks is taken up where it broke."""
        last_id, failures = "", 0
        while True:
            try:
                for event in self._stream(job_id, last_id):
                    last_id, failures = event.id or last_id, 0
                    yield event
                    if event.event.removeprefix("job.") in TERMINAL:
                        return
                # Ended early: the server drains, or this reader was too slow, or there is nothing left to tell.
                if self.job(job_id)["status"] in TERMINAL:
                    return
            except Unreachable:
                if failures >= RECONNECTS:
                    raise
            failures += 1
            time.sleep(min(0.1 * 2**failures, 3.0))

    def _uploaded(self, digest: str) -> int | None:
        """How many bytes of a blob have come; None when it is complete."""
        with self._reaching():
            response = self._http.head(f"/v1/blobs/sha256:{digest}")
        if response.status_code == httpx.codes.NOT_FOUND and "upload-offset" in response.headers:
            return int(response.headers["upload-offset"])
        _check(response)
        return None

    def _put(self, path: Path, digest: str, offset: int, size: int, sent: Callable[[int, int], None]) -> None:
        start = offset if offset <= size else 0
        headers = {"Content-Length": str(size - start), "Content-Type": "application/octet-stream"}
        if offset <= size:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}" if start < size else f"bytes */{size}"
        timeout = httpx.Timeout(30.0, read=UPLOAD_ANSWER_S)
        with self._reaching():
            content = _chunks(path, start, size, sent)
            address = f"/v1/blobs/sha256:{digest}"
            _check(self._http.put(address, content=content, headers=headers, timeout=timeout))

    def _stream(self, job_id: str, last_id: str) -> Iterator[ServerSentEvent]:
        headers = {"Last-Event-ID": last_id} if last_id else {}
        timeout = httpx.Timeout(10.0, read=STREAM_SILENCE_S)
        address = f"/v1/jobs/{quote(job_id, safe='')}/events"
        with self._reaching(), connect_sse(self._http, "GET", address, headers=headers, timeout=timeout) as source:
            if source.response.status_code != httpx.codes.NO_CONTENT:
                _check(source.response)
                # What has no data only tells when to reconnect.
                yield from (event for event in source.iter_sse() if event.data)

    def _json(self, method: str, address: str, **options: Any) -> dict[str, Any]:
        with self._reaching():
            response = self._http.request(method, address, **options)
            _check(response)
            answer: dict[str, Any] = response.json()
            return answer

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except (httpx.TransportError, SSEError) as error:
            what = str(error) or type(error).__name__
            kind = Unreachable if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)) else Lost
            raise kind({"code": "server_unreachable", "detail": f"no answer from {self.url}: {what}"}) from error
        except (httpx.InvalidURL, json.JSONDecodeError) as error:
            raise Failed({"code": "not_arrowquant", "detail": f"{self.url} is not this service: {error}"}) from error


def _chunks(path: Path, start: int, size: int, sent: Callable[[int, int], None]) -> Iterator[bytes]:
    """The bytes of a file from `start` on, as many as were announced."""
    with path.open("rb") as file:
        file.seek(start)
        while start < size and (chunk := file.read(min(CHUNK_BYTES, size - start))):
            yield chunk
            start += len(chunk)
            sent(start, len(chunk))


class Unreachable(Failed):
    """The server does not answer now; it may later."""


class Lost(Unreachable):
    """The connection broke in the middle: the call may have been carried out."""


def _authorization(api_key: str | None) -> dict[str, str]:
    key = (api_key or "").strip()
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        # Checked here, because the client's own complaint would show the key.
        raise Failed(
            {"code": "invalid_request", "detail": "the API key holds characters that no key has"}, status=USAGE
        )
    return {"Authorization": f"Bearer {key}"}


def _check(response: httpx.Response) -> None:
    if response.is_success:
        return
    response.read()
    problem = {"code": f"http_{response.status_code}", "detail": f"the server answered {response.status_code}"}
    if response.content and response.headers.get("content-type", "").startswith("application/problem+json"):
        problem = response.json()
    kind = Unreachable if response.status_code in (502, 503, 504) else Failed
    raise kind(problem, status=USAGE if problem.get("code") in USAGE_CODES else FAILED)
