"""Who calls, and what they may do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from service.errors import ForbiddenScope
from service.jobs.api_keys import Scope
from service.jobs.tenant import DEFAULT_TENANT

#: What anybody may call: whether the service lives, and what its problems mean.
OPEN_PATHS = ("/healthz", "/readyz")
OPEN_PREFIX = "/problems/"
ADMIN_PATHS = ("/metrics", "/v1/gc")
READING = ("GET", "HEAD")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls: a tenant, by a key; where no keys are asked for, the default tenant, who may do everything."""

    tenant: str
    scopes: frozenset[Scope]
    key_id: str | None = None

    @property
    def reach(self) -> str | None:
        """Whose resources the caller sees: its tenant's, or anybody's (None) with the scope admin."""
        return None if Scope.ADMIN in self.scopes else self.tenant

    def check_may(self, scope: Scope) -> None:
        """Raise ForbiddenScope unless the caller has this scope, or admin, which is all of them."""
        if not self.scopes & {scope, Scope.ADMIN}:
            has = ", ".join(sorted(self.scopes))
            raise ForbiddenScope(f"this call takes the scope {scope}, and key {self.key_id} has {has}")


#: Who calls where no keys are asked for.
ANYBODY = Principal(DEFAULT_TENANT, frozenset(Scope))


def is_open(path: str) -> bool:
    """Whether a path takes no key."""
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIX)


def scope_for(method: str, path: str) -> Scope:
    """The scope that a call takes; one rule for all routes, so that a new one cannot be left open."""
    if path in ADMIN_PATHS:
        return Scope.ADMIN
    return Scope.READ if method in READING else Scope.SUBMIT


async def _caller(request: Request) -> Principal:
    # Not a plain function, which the framework would call in a thread.
    principal: Principal = request.scope.get("principal", ANYBODY)
    return principal


Caller = Annotated[Principal, Depends(_caller)]
