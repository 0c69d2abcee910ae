"""Who calls, and what they may do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from fastapi import Depends, Request

from service.jobs.tenant import DEFAULT_TENANT


class Scope(StrEnum):
    """What a key is good for; each includes those before it only where a key names both."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls: a tenant, by a key; without keys everybody is the default tenant and may do everything."""

    tenant: str
    scopes: frozenset[Scope]
    key_id: str | None = None

    @property
    def reach(self) -> str | None:
        """Whose resources the caller sees: its tenant's, or anybody's (None) with the scope admin."""
        return None if Scope.ADMIN in self.scopes else self.tenant


ANYBODY = Principal(DEFAULT_TENANT, frozenset(Scope))


def _caller(request: Request) -> Principal:
    principal: Principal = request.scope.get("principal", ANYBODY)
    return principal


Caller = Annotated[Principal, Depends(_caller)]
