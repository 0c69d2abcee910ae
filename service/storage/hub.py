"""`hf://` through huggingface_hub: the files of one commit, read by ranges from wherever the hub sends us."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any, TypeVar

import httpx

from service.errors import (
    ArrowQuantError,
    ModelNotFound,
    StoreRefused,
    StoreUnavailable,
    UnsupportedModel,
)
from service.storage.remote_address import RemoteAddress
from service.storage.remote_files import MAX_ENTRIES, Entry, source_changed
from service.storage.store_faults import is_passing, require, store_error
from service.storage.store_options import StoreOptions

T = TypeVar("T")
EXTRA = "hub"
CONNECT_S = 5.0
REQUEST_S = 30.0
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
MAX_REDIRECTS = 5
PIECE_BYTES = 1 << 20
#: What a file store behind the hub answers when the address that it was reached by has expired.
_EXPIRED = frozenset({400, 401, 403, 404, 410})


class HubRepository:
    """A model of the hub at one commit; each method blocks, for a bounded time when the hub does not answer.

    Raises StoreRefused, ModelNotFound and StoreUnavailable.
    """

    def __init__(self, address: RemoteAddress, options: StoreOptions) -> None:
        """Raises InvalidConfig when the extra is not installed."""
        self._hub: Any = require("huggingface_hub", address.scheme, EXTRA)
        self._errors: Any = require("huggingface_hub.errors", address.scheme, EXTRA)
        constants: Any = require("huggingface_hub.constants", address.scheme, EXTRA)
        self._endpoint = httpx.URL(options.hub_endpoint or constants.ENDPOINT)
        self._allow_http = options.allow_http
        self._timeout_s = options.timeout_s
        self._request_s = min(REQUEST_S, options.timeout_s)
        self._repository = address.repository
        self._prefix = "".join(f"{part}/" for part in address.path)
        self._what = f"hf://{address.repository}@{address.revision}"
        info = self._call(lambda: self._ask(address.revision), f"looking at {self._what}")
        #: The commit that the revision named when this was made.
        self.commit = str(info.sha)
        self._siblings = info.siblings or []
        # The token, if there is one, is sent to the hub itself and to nobody else.
        self._headers = dict(self._hub.utils.build_hf_headers()) | {"Accept-Encoding": "identity"}
        self._client = httpx.Client(timeout=httpx.Timeout(self._request_s, connect=CONNECT_S))
        self._elsewhere: dict[PurePosixPath, httpx.URL] = {}

    def entries(self) -> list[tuple[str, Entry]]:
        """Every file below the address's path, by its name relative to that; raises UnsupportedModel for too many."""
        if len(self._siblings) > MAX_ENTRIES:
            raise UnsupportedModel(f"The model holds more than {MAX_ENTRIES} files.")
        named = ((str(s.rfilename), s) for s in self._siblings)
        return [(name[len(self._prefix) :], _entry(s)) for name, s in named if name.startswith(self._prefix)]

    def stat(self, name: PurePosixPath) -> Entry | None:
        """The file of this name, None when there is none; a commit never changes."""
        full = f"{self._prefix}{name}"
        return next((_entry(s) for s in self._siblings if s.rfilename == full), None)

    def fetch(self, name: PurePosixPath, entry: Entry, start: int, stop: int) -> memoryview:
        """Bytes start to stop of a file that is still this entry; else raises SourceChanged."""
        return memoryview(self._call(lambda: self._get(name, entry, start, stop), f"reading {name}"))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _ask(self, revision: str) -> Any:
        api = self._hub.HfApi(endpoint=str(self._endpoint).rstrip("/"))
        return api.model_info(self._repository, revision=revision, files_metadata=True, timeout=self._request_s)

    def _get(self, name: PurePosixPath, entry: Entry, start: int, stop: int) -> bytes:
        known = self._elsewhere.get(name)
        if known is not None:
            status, data, _ = self._request(known, entry, start, stop)
            if data is not None:
                return data
            if status not in _EXPIRED:
                raise _Unanswered(status)
            self._elsewhere.pop(name, None)
        url = self._resolve_url(name)
        for _ in range(MAX_REDIRECTS):
            status, data, headers = self._request(url, entry, start, stop)
            if self._is_hub(url):
                _check_version(name, entry, headers, data is not None)
            if data is not None:
                return data
            location = headers.get("location")
            if location is None or not 300 <= status < 400:
                raise _Unanswered(status)
            url = url.join(location)
            if url.scheme != "https" and not self._allow_http:
                raise StoreRefused(f"the hub sends elsewhere for {name}, and not by HTTPS, which is not followed")
            if not self._is_hub(url):
                self._elsewhere[name] = url
        raise StoreUnavailable(f"the hub sends round and round for {name}")

    def _request(
        self, url: httpx.URL, entry: Entry, start: int, stop: int
    ) -> tuple[int, bytes | None, Mapping[str, str]]:
        """Status, the bytes if they have come, and headers of one answer."""
        own = self._headers if self._is_hub(url) else {"Accept-Encoding": "identity"}
        headers = own | {"Range": f"bytes={start}-{stop - 1}"}
        with self._client.stream("GET", url, headers=headers) as answer:
            whole = answer.status_code == 200 and (start, stop) == (0, entry.size)
            if answer.status_code != 206 and not whole:
                return answer.status_code, None, answer.headers
            if not whole and answer.headers.get("content-range") != f"bytes {start}-{stop - 1}/{entry.size}":
                raise _Unanswered(None)
            data = bytearray()
            for piece in answer.iter_raw(PIECE_BYTES):
                data += piece
                if len(data) > stop - start:
                    break
            if len(data) != stop - start:
                raise _Unanswered(None)
            return answer.status_code, bytes(data), answer.headers

    def _resolve_url(self, name: PurePosixPath) -> httpx.URL:
        endpoint = str(self._endpoint).rstrip("/")
        return httpx.URL(
            self._hub.hf_hub_url(self._repository, f"{self._prefix}{name}", revision=self.commit, endpoint=endpoint)
        )

    def _is_hub(self, url: httpx.URL) -> bool:
        return (url.scheme, url.host, url.port) == (self._endpoint.scheme, self._endpoint.host, self._endpoint.port)

    def _call(self, call: Callable[[], T], doing: str) -> T:
        """Make a call again until the hub has answered it or the time is over; then raise what it means."""
        deadline, pause = time.monotonic() + self._timeout_s, FIRST_PAUSE_S
        while True:
            try:
                return call()
            except ArrowQuantError:
                raise
            except self._errors.GatedRepoError:
                raise StoreRefused(
                    f"{self._repository} is gated, and the hub does not give it to this server: its operator accepts "
                    "the terms on the hub, and sets HF_TOKEN"
                ) from None
            except self._errors.RevisionNotFoundError:
                raise ModelNotFound(
                    f"the model {self._repository} has no such revision; a slash in one is written %2F, as in "
                    "hf://owner/name@refs%2Fpr%2F1"
                ) from None
            except self._errors.RepositoryNotFoundError:
                raise ModelNotFound(
                    f"the hub has no model {self._repository} that this server could see with the token it has"
                ) from None
            except _Unanswered as error:
                status = error.status
            except (OSError, self._errors.HTTPError, httpx.HTTPError) as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
            except (ValueError, KeyError, TypeError, AttributeError, httpx.InvalidURL):
                raise StoreUnavailable(
                    f"the hub answered with something else than was asked for while {doing}"
                ) from None
            if not is_passing(status) or time.monotonic() + pause > deadline:
                raise store_error(status, self._what, doing) from None
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)


class _Unanswered(Exception):
    """There are no bytes in an answer with this status, or fewer than it said."""

    def __init__(self, status: int | None) -> None:
        super().__init__(status)
        self.status = status


def _entry(sibling: Any) -> Entry:
    lfs = sibling.lfs
    tag = lfs["sha256"] if isinstance(lfs, dict) else (lfs.sha256 if lfs is not None else sibling.blob_id)
    if sibling.size is None or not tag:
        raise StoreUnavailable("the hub does not tell how large its files are, or what they are")
    return Entry(int(sibling.size), str(tag))


def _check_version(name: PurePosixPath, entry: Entry, headers: Mapping[str, str], is_answer: bool) -> None:
    """Raise SourceChanged when the hub says that the file is another than was listed."""
    told = headers.get("x-linked-etag") or (headers.get("etag") if is_answer else None)
    if told is not None and told.removeprefix("W/").strip('"') != entry.tag:
        raise source_changed(name)
