"""Roles, scopes, and the form of API keys. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Final, Literal

Role = Literal["owner", "admin", "operator", "viewer"]
Scope = Literal["read", "run", "write", "admin"]

EVERYTHING: Final[frozenset[Scope]] = frozenset(("read", "run", "write", "admin"))
ROLE_SCOPES: Final[dict[Role, frozenset[Scope]]] = {
    "owner": EVERYTHING,
    "admin": EVERYTHING,
    "operator": frozenset(("read", "run")),
    "viewer": frozenset(("read",)),
}

KEY_START = "claw_"
# The shown part of a key has seven of its 43 random characters, so that its owner can recognise it.
_PREFIX_LENGTH = len(KEY_START) + 7


def api_key(random: str) -> str:
    """The plaintext of a key. `random`: at least 32 random bytes, URL-safe base64."""
    return KEY_START + random


def prefix(key: str) -> str:
    """The part of a key that may be shown and stored."""
    return key[:_PREFIX_LENGTH]


def key_hash(key: str) -> bytes:
    """The stored form of a key. It needs no salt and no slow hash, because 256 random bits cannot be guessed."""
    return hashlib.sha256(key.encode()).digest()


def scopes_in_force(given: Collection[Scope], role: Role | None) -> frozenset[Scope]:
    """The scopes that a key has now. `role` is the present role of the key's member, None for a tenant's key."""
    return frozenset(given) & (EVERYTHING if role is None else ROLE_SCOPES[role])


def may_become(owners: Collection[str], member_id: str, role: Role | None) -> bool:
    """True if this member may get `role`, or leave (None): the last of the `owners` must stay an owner."""
    return role == "owner" or set(owners) != {member_id}
