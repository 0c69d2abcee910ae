"""Whose a resource is."""

from __future__ import annotations

import re

from service.errors import InvalidConfig

#: Owns everything that was made without a key.
DEFAULT_TENANT = "default"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def check_tenant(name: str) -> None:
    """Raise InvalidConfig unless this can be a tenant's name."""
    if not _NAME.fullmatch(name):
        raise InvalidConfig(
            f"{name!r} cannot name a tenant: take up to 64 of a-z, 0-9, '.', '_' and '-', the first a letter or digit"
        )
