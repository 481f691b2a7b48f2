"""Roles, scopes and keys."""

from __future__ import annotations

import hashlib

import pytest

from services.user.domain import EVERYTHING, Role, api_key, key_hash, may_become, prefix, scopes_in_force


@pytest.mark.parametrize(
    ("role", "scopes"),
    [
        ("viewer", {"read"}),
        ("operator", {"read", "run"}),
        ("admin", {"read", "run", "write", "admin"}),
        ("owner", {"read", "run", "write", "admin"}),
    ],
)
def test_a_members_key_can_do_no_more_than_the_role(role: Role, scopes: set[str]) -> None:
    assert scopes_in_force(EVERYTHING, role) == scopes


def test_a_members_key_can_do_no_more_than_it_was_given() -> None:
    assert scopes_in_force(["read", "write"], "operator") == {"read"}


def test_a_tenants_own_key_can_do_what_it_was_given() -> None:
    assert scopes_in_force(["read", "admin"], None) == {"read", "admin"}


def test_a_key_shows_its_beginning_and_is_stored_as_sha_256() -> None:
    key = api_key("x" * 43)
    assert key == "claw_" + "x" * 43
    assert prefix(key) == "claw_xxxxxxx"
    assert key_hash(key) == hashlib.sha256(key.encode()).digest()


def test_the_last_owner_stays_one() -> None:
    assert not may_become(["a"], "a", None)
    assert not may_become(["a"], "a", "admin")
    assert may_become(["a"], "a", "owner")
    assert may_become(["a", "b"], "a", None)
    assert may_become(["a"], "b", None)
