"""A server that asks for keys, and clients that have some."""

from __future__ import annotations

from typing import Any

import httpx

from service.jobs.api_keys import ApiKey, ApiKeys, Scope
from tests.server import Json, Server

ALL_BUT_ADMIN = (Scope.READ, Scope.SUBMIT)


class Client(httpx.Client):
    """Calls with one key, or without."""

    def __init__(self, server: Server, key: ApiKey | None = None, text: str | None = None) -> None:
        headers = {} if text is None else {"Authorization": f"Bearer {text}"}
        super().__init__(base_url=server.base_url, headers=headers, timeout=90.0)
        self.key = key
        self.text = text

    def submit(self, asked: Json) -> Json:
        """Create a job."""
        response = self.post("/v1/jobs", json=asked)
        assert response.status_code == 202, response.text
        job: Json = response.json()
        return job

    def run(self, asked: Json) -> Json:
        """Create a job and wait for its success."""
        job: Json = self.submit(asked)
        while job["status"] not in ("succeeded", "failed", "cancelled"):
            job = self.get(f"/v1/jobs/{job['id']}", headers={"Prefer": "wait=30"}).json()
        assert job["status"] == "succeeded", job
        return job


class Keyed:
    """A running server with `require_keys`."""

    def __init__(self, server: Server) -> None:
        self.server = server.start()
        self.keys = ApiKeys(server.data_dir)
        self.anonymous = Client(server)
        self._clients: list[Client] = [self.anonymous]

    def client(self, tenant: str, *scopes: Scope, **options: Any) -> Client:
        """Calls with a new key of this tenant, by default for reading and submitting."""
        key, text = self.keys.create(tenant, scopes or ALL_BUT_ADMIN, **options)
        self._clients.append(Client(self.server, key, text))
        return self._clients[-1]

    def revoke(self, client: Client) -> None:
        """End the key of a client."""
        assert client.key is not None
        self.keys.revoke(client.key.id)

    def stop(self) -> None:
        """Close all, and look whether the log names a key."""
        for client in self._clients:
            client.close()
        self.keys.close()
        self.server.stop()
        log = self.server.log
        assert "Traceback" not in log, self.server.log_end
        assert not any(client.text and client.text.split("_", 2)[2] in log for client in self._clients)
