"""Whose a resource is."""

from __future__ import annotations

#: Owns everything that was made without a key.
DEFAULT_TENANT = "default"
