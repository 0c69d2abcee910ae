"""Blobs of several tenants: one file for all, and nobody learns what another has."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bench.small_disk import may_mount
from service.errors import (
    BlobNotFound,
    BlobTooLarge,
    DigestMismatch,
    StorageQuotaExceeded,
    UploadInProgress,
    UploadOffsetMismatch,
)
from service.jobs.blob_paths import check_path, check_together
from service.jobs.blobs import BlobLimits, Blobs, Key, Span
from service.jobs.collector import Collector
from service.jobs.database import Database
from service.jobs.folders import Folders
from service.jobs.leases import Leases
from service.jobs.removal import Removals
from service.jobs.retention import Rules
from service.jobs.store import Store
from service.storage.upload import BlobFiles
from tests.jobs.test_restart import REPOSITORY

DATA = bytes(range(256)) * 64
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A fresh database."""
    opened = Store(tmp_path)
    yield opened
    opened.close()


def open_blobs(tmp_path: Path, store: Store, **limits: float) -> Blobs:
    """The blobs of a folder, as at the start of a server."""
    blobs = Blobs(tmp_path / "blobs", lambda: store, BlobLimits(**limits))  # type: ignore[arg-type]
    blobs.create()
    assert all(blobs.recover())
    return blobs


def sweep(tmp_path: Path, store: Store, blobs: Blobs, *in_use: Key) -> None:
    """A sweep that keeps blobs for 100 s."""

    async def work() -> None:
        with ThreadPoolExecutor(1) as thread:
            database, leases = Database(lambda: store, thread), Leases()
            removals = Removals(database, Folders(tmp_path), leases, asyncio.ensure_future)
            collector = Collector(database, leases, removals, blobs, lambda: in_use)
            await collector.sweep(Rules(blob_ttl_s=100), datetime.now(UTC))

    asyncio.run(work())


def send(blobs: Blobs, tenant: str, data: bytes, digest: str | None = None) -> str:
    """A whole blob in one call; its digest."""
    digest = digest or hashlib.sha256(data).hexdigest()
    upload = blobs.begin(tenant, digest, Span(0, len(data), len(data), is_anew=True))
    try:
        upload.write(data)
        assert upload.finish()
    finally:
        upload.close()
    return digest


def send_piece(blobs: Blobs, tenant: str, start: int, stop: int) -> bool:
    """A piece of DATA; whether it was the last."""
    upload = blobs.begin(tenant, DIGEST, Span(start, stop, len(DATA)))
    try:
        upload.write(DATA[start:stop])
        return upload.finish()
    finally:
        upload.close()


def stored_files(tmp_path: Path) -> list[Path]:
    """All files below the blobs."""
    return sorted(path for path in (tmp_path / "blobs").rglob("*") if path.is_file())


def age(store: Store, tenant: str, seconds: float) -> None:
    """Make a tenant's blobs look as if they had not been used for so long."""
    with store.transaction() as db:
        query = "UPDATE blobs SET last_used_at = strftime('%Y-%m-%dT%H:%M:%f+00:00', 'now', ?) WHERE tenant = ?"
        db.execute(query, (f"-{seconds} seconds", tenant))


def test_a_tenant_has_a_blob_only_when_it_has_sent_all_of_it_and_it_is_stored_once(
    tmp_path: Path, store: Store
) -> None:
    blobs = open_blobs(tmp_path, store)
    send(blobs, "ada", DATA)
    assert blobs.find("ada", DIGEST) == len(DATA)
    assert blobs.find("bob", DIGEST) is None
    assert blobs.offset("bob", DIGEST) == 0
    with pytest.raises(BlobNotFound) as refused:
        blobs.use("bob", {"sub/m~1.bin": DIGEST})
    assert refused.value.pointer == "/files/sub~1m~01.bin"
    assert not send_piece(blobs, "bob", 0, 1000)
    assert blobs.find("bob", DIGEST) is None
    assert blobs.offset("bob", DIGEST) == 1000
    assert send_piece(blobs, "bob", 1000, len(DATA))
    assert blobs.find("bob", DIGEST) == len(DATA)
    (only,) = stored_files(tmp_path)
    assert only.read_bytes() == DATA
    assert only.stat().st_nlink == 1


def test_one_that_claims_a_digest_without_the_bytes_gets_nothing(tmp_path: Path, store: Store) -> None:
    blobs = open_blobs(tmp_path, store)
    send(blobs, "ada", DATA)
    with pytest.raises(DigestMismatch):
        send(blobs, "bob", bytes(len(DATA)), DIGEST)
    assert blobs.find("bob", DIGEST) is None
    assert blobs.offset("bob", DIGEST) == 0
    assert [path.name for path in stored_files(tmp_path)] == [DIGEST]


def test_a_blob_stays_while_any_tenant_uses_it(tmp_path: Path, store: Store) -> None:
    blobs = open_blobs(tmp_path, store)
    for tenant in ("ada", "bob"):
        send(blobs, tenant, DATA)
    age(store, "ada", 200)
    sweep(tmp_path, store, blobs)
    assert blobs.find("ada", DIGEST) is None
    assert blobs.find("bob", DIGEST) == len(DATA)
    age(store, "bob", 200)
    sweep(tmp_path, store, blobs, ("bob", DIGEST))
    assert blobs.find("bob", DIGEST) == len(DATA), "a job used it until now"
    age(store, "bob", 200)
    sweep(tmp_path, store, blobs)
    assert stored_files(tmp_path) == []


def test_parts_that_nobody_goes_on_with_expire_and_those_being_sent_do_not(tmp_path: Path, store: Store) -> None:
    blobs = open_blobs(tmp_path, store)
    send_piece(blobs, "ada", 0, 1000)
    (part,) = stored_files(tmp_path)
    os.utime(part, (time.time() - 200,) * 2)
    upload = blobs.begin("ada", DIGEST, Span(1000, 1000, len(DATA)))
    sweep(tmp_path, store, blobs)
    assert part.exists()
    upload.close()
    sweep(tmp_path, store, blobs)
    assert not part.exists()
    assert blobs.offset("ada", DIGEST) == 0


def test_only_one_call_at_a_time_sends_a_blob(tmp_path: Path, store: Store) -> None:
    blobs = open_blobs(tmp_path, store)
    first = blobs.begin("ada", DIGEST, Span(0, 10, len(DATA)))
    with pytest.raises(UploadInProgress):
        blobs.begin("ada", DIGEST, Span(0, 10, len(DATA)))
    assert send(blobs, "bob", DATA) == DIGEST, "another tenant is not in the way"
    first.close()
    assert send(blobs, "ada", DATA) == DIGEST


@pytest.mark.parametrize("start", [0, 999, 1001, len(DATA) - 1])
def test_a_piece_has_to_start_where_the_last_one_ended(tmp_path: Path, store: Store, start: int) -> None:
    blobs = open_blobs(tmp_path, store)
    send_piece(blobs, "ada", 0, 1000)
    with pytest.raises(UploadOffsetMismatch, match="1000 bytes"):
        send_piece(blobs, "ada", start, len(DATA))
    assert send_piece(blobs, "ada", 1000, len(DATA)), "the refused call holds nothing"


def test_the_hash_goes_on_from_the_bytes_on_the_disk(tmp_path: Path, store: Store, rng: np.random.Generator) -> None:
    cuts = [0, *sorted(rng.integers(1, len(DATA), 9).tolist()), len(DATA)]
    ends = []
    for index, (start, stop) in enumerate(pairwise(cuts)):
        if index % 2 == 0:
            blobs = open_blobs(tmp_path, store)  # another process, which remembers nothing
        ends.append(send_piece(blobs, "ada", start, stop))
    assert ends == [stop == len(DATA) for stop in cuts[1:]]
    assert stored_files(tmp_path)[0].read_bytes() == DATA


def test_a_call_without_bytes_completes_what_is_all_here(tmp_path: Path, store: Store) -> None:
    blobs = open_blobs(tmp_path, store)
    upload = blobs.begin("ada", DIGEST, Span(0, len(DATA), len(DATA)))
    upload.write(DATA)
    upload.close()  # killed before the end
    blobs = open_blobs(tmp_path, store)
    assert blobs.find("ada", DIGEST) is None
    upload = blobs.begin("ada", DIGEST, Span(None, 0, len(DATA)))
    assert upload.finish()
    upload.close()
    assert blobs.find("ada", DIGEST) == len(DATA)


def test_a_start_removes_what_a_crash_left(tmp_path: Path, store: Store) -> None:
    blobs = open_blobs(tmp_path, store)
    kept = send(blobs, "ada", DATA)
    send_piece(blobs, "bob", 0, 10)
    files = BlobFiles(tmp_path / "blobs")
    orphan = files.path("ab" * 32)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"linked, and killed before the database knew")
    (bobs,) = files.parts()
    leftover = tmp_path / "blobs" / "parts" / bobs.owner / bobs.digest
    twin = hashlib.sha256(b"ada").hexdigest()[:32]
    (tmp_path / "blobs" / "parts" / twin / DIGEST).write_bytes(DATA)
    open_blobs(tmp_path, store)
    assert stored_files(tmp_path) == sorted([leftover, files.path(kept)])


def test_what_a_crash_left_is_looked_for_a_little_at_a_time_and_what_is_being_sent_stays(
    tmp_path: Path, store: Store
) -> None:
    blobs = open_blobs(tmp_path, store)
    files = BlobFiles(tmp_path / "blobs")
    for index in range(250):
        path = files.path(f"{index % 7:02x}{index:062x}")
        path.parent.mkdir(exist_ok=True)
        path.touch()
    send(blobs, "ada", DATA)
    with closing(blobs.begin("ada", DIGEST, Span(0, len(DATA), len(DATA)))) as again:
        steps = blobs.recover()
        assert next(steps)
        left = len(stored_files(tmp_path))
        assert 100 < left < 250
        assert blobs.find("ada", DIGEST) == len(DATA), "others have their turn in between"
        assert sum(steps) >= 2
        again.write(DATA)
        assert again.finish()
    assert stored_files(tmp_path) == [files.path(DIGEST)]


def test_a_file_that_somebody_removed_has_to_be_sent_again(tmp_path: Path, store: Store) -> None:
    blobs = open_blobs(tmp_path, store)
    send(blobs, "ada", DATA)
    stored_files(tmp_path)[0].unlink()
    with pytest.raises(BlobNotFound):
        blobs.use("ada", {"m": DIGEST})
    send(blobs, "ada", DATA)
    blobs.use("ada", {"m": DIGEST})


def test_the_quota_counts_blobs_and_what_is_on_its_way(tmp_path: Path, store: Store) -> None:
    blobs = open_blobs(tmp_path, store, max_stored_bytes=50_000, max_blob_bytes=60_000)
    with pytest.raises(BlobTooLarge):
        blobs.begin("ada", DIGEST, Span(0, 1, 60_001))
    with pytest.raises(StorageQuotaExceeded):
        blobs.begin("ada", DIGEST, Span(0, 1, 50_001))
    send(blobs, "ada", DATA)  # 16384
    other = blobs.begin("ada", "1" * 64, Span(0, 20_000, 20_000))
    with pytest.raises(StorageQuotaExceeded, match="16384 are taken and 20000 promised"):
        blobs.begin("ada", "2" * 64, Span(0, 20_000, 20_000))
    send(blobs, "bob", DATA)
    other.close()
    blobs.begin("ada", "2" * 64, Span(0, 20_000, 20_000)).close()


def test_many_tiny_blobs_count_as_the_blocks_that_they_take(tmp_path: Path, store: Store) -> None:
    blobs = open_blobs(tmp_path, store, max_stored_bytes=10_000)
    send(blobs, "ada", b"a")
    send(blobs, "ada", b"b")
    with pytest.raises(StorageQuotaExceeded):
        send(blobs, "ada", b"c")


def test_a_quota_of_the_tenants_own_goes_before_that_of_all(tmp_path: Path, store: Store) -> None:
    blobs = open_blobs(tmp_path, store, max_stored_bytes=10_000)
    with store.transaction() as db:
        db.execute("INSERT INTO tenants (id, max_stored_bytes) VALUES ('ada', 20000)")
    send(blobs, "ada", DATA)
    with pytest.raises(StorageQuotaExceeded):
        send(blobs, "bob", DATA)


FULL_DISK = """
import sys
from pathlib import Path
from service.errors import DiskFull
from service.jobs.store import Store
from tests.jobs.test_blobs import open_blobs
from service.jobs.blobs import Span
import hashlib
disk, data = Path(sys.argv[1]), bytes(1 << 20)
store = Store(disk)
(disk / "filler").write_bytes(bytes(1_600_000))
blobs = open_blobs(disk, store)
digest = hashlib.sha256(data).hexdigest()
upload = blobs.begin("ada", digest, Span(0, len(data), len(data)))
try:
    upload.write(data)
except DiskFull as error:
    print("full", error.detail)
upload.close()
offset = blobs.offset("ada", digest)
assert 0 < offset < len(data), offset
(disk / "filler").unlink()
upload = blobs.begin("ada", digest, Span(offset, len(data), len(data)))
upload.write(data[offset:])
print("whole", upload.finish())
upload.close()
store.close()
"""


@pytest.mark.skipif(not may_mount(), reason="needs a mount namespace to make a small disk in")
def test_a_full_disk_costs_nothing_that_has_come(tmp_path: Path) -> None:
    small_disk = 'mount -t tmpfs -o size=2500k none "$0" && exec "$@"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", small_disk, str(tmp_path)]
    program = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run([*command, *program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "full there was no space left while storing the upload: free some and try again",
        "whole True",
    ]


NOT_RELATIVE = ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", "./a", ".hidden", "a/.git/b"]
NOT_PLAIN = ["a\\b", "a\nb", "a\0b", "a\u202eb", " a", "a.", "a /b", "a" * 256, "a/" * 512 + "a", "cafe\u0301"]


@pytest.mark.parametrize("path", NOT_RELATIVE + NOT_PLAIN)
def test_a_path_that_is_not_plain_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"is|has|holds"):
        check_path(path)


@pytest.mark.parametrize("path", ["model.safetensors", "unet/a_b-c.json", "modèle.bin", "a b", "a..b"])
def test_a_plain_path_is_taken_as_it_is(path: str) -> None:
    assert check_path(path) == path


@pytest.mark.parametrize("paths", [["a", "A"], ["a", "a/b"], ["A", "a/b"], ["straße", "STRASSE"]])
def test_paths_that_are_one_on_some_file_system_are_refused(paths: list[str]) -> None:
    with pytest.raises(ValueError, match=r"same file|is a file"):
        check_together(paths)


def test_a_folder_of_blobs_is_links_and_can_be_laid_out_again(tmp_path: Path, store: Store) -> None:
    blobs = open_blobs(tmp_path, store)
    send(blobs, "ada", DATA)
    folder = tmp_path / "work"
    for _ in range(2):
        blobs.lay_out("ada", {"a/b.bin": DIGEST, "c.bin": DIGEST}, folder)
    (blob,) = stored_files(tmp_path)
    assert (folder / "a" / "b.bin").samefile(blob)
    assert (folder / "c.bin").samefile(blob)
    shutil.rmtree(folder)
    assert blob.read_bytes() == DATA
