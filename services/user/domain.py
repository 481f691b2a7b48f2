"""Roles, scopes, and what an API key is: pure."""

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
# What is shown of a key, so that its owner knows it again: seven of its 43 random characters.
_PREFIX_LENGTH = len(KEY_START) + 7


def api_key(random: str) -> str:
    """The plaintext of a key. `random`: at least 32 random bytes, URL-safe base64."""
    return KEY_START + random


def prefix(key: str) -> str:
    """The part of a key that may be shown and stored."""
    return key[:_PREFIX_LENGTH]


def key_hash(key: str) -> bytes:
    """What is stored of a key. No salt and no slow hash: nobody can guess 256 random bits."""
    return hashlib.sha256(key.encode()).digest()


def scopes_in_force(given: Collection[Scope], role: Role | None) -> frozenset[Scope]:
    """What a key may do now; `role`: of the member whose key it is, which may be another than when it was made."""
    return frozenset(given) & (EVERYTHING if role is None else ROLE_SCOPES[role])


def may_become(owners: Collection[str], member_id: str, role: Role | None) -> bool:
    """May this member get `role`, or leave (None)? Not where it is the last one of `owners`."""
    return role == "owner" or set(owners) != {member_id}
