"""Stores that tests of this folder share: an S3 server behind a proxy, and a hub."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.stores import ACCESS_KEY, HUB_TOKEN, S3, SECRET_KEY, Hub, Proxy, running_s3


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """A real S3 server with the bucket `models`."""
    with running_s3() as s3:
        s3.bucket("models")
        yield s3


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the server, as the tools of the stores look for them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)


@pytest.fixture
def proxy(s3_server: S3) -> Iterator[Proxy]:
    """The way to the S3 server, where a test can break something."""
    running = Proxy(s3_server.url)
    yield running
    running.close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub that wants the token."""
    running = Hub(HUB_TOKEN)
    yield running
    running.close()
