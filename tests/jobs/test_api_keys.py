"""API keys in the database: kept as hashes, compared in constant time, changed beside a server."""

from __future__ import annotations

import hmac
import sqlite3
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from service.errors import InvalidConfig, NotFound, StorageFailure, Unauthorized
from service.jobs.api_keys import ApiKeys, Scope
from service.jobs.quotas import NO_LIMITS, Limits
from service.jobs.store import DATABASE, LOCK, MIGRATIONS, Store


@pytest.fixture
def keys(tmp_path: Path):
    with ApiKeys(tmp_path) as opened:
        yield opened


def test_a_key_is_verified_with_its_tenant_and_scopes(keys: ApiKeys) -> None:
    key, text = keys.create("acme", [Scope.READ, Scope.SUBMIT], name="ci", requests_per_minute=5)
    assert keys.verify(text) == (key, NO_LIMITS)
    assert keys.all() == keys.all("acme") == [key]
    assert keys.all("other") == []


def test_the_database_holds_nothing_of_a_key_but_its_id_and_hash(tmp_path: Path, keys: ApiKeys) -> None:
    _, text = keys.create("acme", [Scope.READ])
    secret = text.split("_", 2)[2].encode()
    assert len(secret) == 43, "256 bits"
    assert not any(secret in path.read_bytes() for path in tmp_path.iterdir() if path.is_file())


def test_no_two_keys_are_alike(keys: ApiKeys) -> None:
    texts = {keys.create("acme", [Scope.READ])[1] for _ in range(50)}
    assert len(texts) == 50


def test_hashes_are_compared_in_constant_time_whether_the_id_is_known_or_not(
    keys: ApiKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def noted(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", noted)
    _, text = keys.create("acme", [Scope.READ])
    keys.verify(text)
    for wrong in (text[:-1] + "!", "aq_key0_" + "x" * 43, "nonsense", "", "a" * 10_000):
        with pytest.raises(Unauthorized):
            keys.verify(wrong)
    assert len(compared) == 6
    assert all(len(one) == len(other) == 32 for one, other in compared)


def test_revoked_and_expired_keys_are_not_usable(keys: ApiKeys) -> None:
    assert not keys.has_usable()
    key, text = keys.create("acme", [Scope.READ], expires_at=datetime.now(UTC) + timedelta(hours=1))
    assert keys.has_usable()
    first = keys.revoke(key.id)
    assert keys.revoke(key.id) == first, "revoked once"
    assert not keys.has_usable()
    with pytest.raises(Unauthorized, match="revoked"):
        keys.verify(text)
    with pytest.raises(NotFound):
        keys.revoke("key0")
    with pytest.raises(InvalidConfig, match="future"):
        keys.create("acme", [Scope.READ], expires_at=datetime.now(UTC))


@pytest.mark.parametrize("tenant", ["", "Acme", "a b", "../a", "-a", "a" * 65, "a\n", "ä"])
def test_names_that_are_no_tenants_are_refused(keys: ApiKeys, tenant: str) -> None:
    with pytest.raises(InvalidConfig, match="tenant"):
        keys.create(tenant, [Scope.READ])
    with pytest.raises(InvalidConfig, match="tenant"):
        keys.set_limits(tenant, Limits(1, 2, 3))


def test_limits_of_a_tenant_come_with_its_keys(keys: ApiKeys) -> None:
    key, text = keys.create("acme", [Scope.READ])
    keys.set_limits("acme", Limits(max_open_jobs=3))
    assert keys.verify(text) == (key, Limits(max_open_jobs=3))
    assert keys.limits("acme").over(Limits(9, 8, 7)) == Limits(3, 8, 7)
    keys.set_limits("acme", NO_LIMITS)
    assert keys.limits("acme") == keys.limits("unknown") == NO_LIMITS


def test_keys_are_made_and_revoked_while_a_server_holds_the_folder(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with ApiKeys(tmp_path) as beside, ApiKeys(tmp_path) as servers:
        key, text = beside.create("acme", [Scope.READ])
        assert servers.verify(text)[0] == key
        beside.revoke(key.id)
        with pytest.raises(Unauthorized):
            servers.verify(text)
    store.close()


def test_keys_wait_while_another_connection_writes(tmp_path: Path, keys: ApiKeys) -> None:
    writer = sqlite3.connect(tmp_path / DATABASE, isolation_level=None, check_same_thread=False)
    writer.execute("BEGIN IMMEDIATE")
    ending = threading.Timer(0.3, lambda: writer.execute("COMMIT"))
    ending.start()
    keys.create("acme", [Scope.READ])
    ending.join()
    writer.close()


def test_a_database_of_another_schema_is_left_to_the_server_that_holds_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    db = sqlite3.connect(tmp_path / DATABASE)
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS) - 1}")
    with pytest.raises(StorageFailure, match="in use by another server"):
        ApiKeys(tmp_path)
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()
    store.close()
    with pytest.raises(StorageFailure, match="newer"):
        ApiKeys(tmp_path)
    assert (tmp_path / LOCK).exists()
