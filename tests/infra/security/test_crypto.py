"""A sealed value opens only for its own purpose and context."""

from __future__ import annotations

import base64
import os

import pytest

from infra.errors import InvalidMessage
from infra.security.crypto import Cipher, DataKey, read_key

KEY = base64.b64encode(bytes(range(32))).decode()


@pytest.fixture
def cipher() -> Cipher:
    return Cipher(KEY)


def test_another_process_with_the_same_key_opens_it(cipher: Cipher) -> None:
    sealed = cipher.seal("bot token ✓", "credentials", "tenant", "channel")
    assert Cipher(KEY).open(sealed, "credentials", "tenant", "channel") == "bot token ✓".encode()
    assert cipher.seal("bot token ✓", "credentials", "tenant", "channel") != sealed


@pytest.mark.parametrize(
    "context",
    [
        ("credentials", "tenant", "other"),
        ("credentials", "tenant"),
        ("credentials", "tenantchannel"),
        ("credentials", "tenantc", "hannel"),
        ("idempotency", "tenant", "channel"),
    ],
)
def test_it_does_not_open_for_another_purpose_or_context(cipher: Cipher, context: tuple[str, ...]) -> None:
    sealed = cipher.seal("secret", "credentials", "tenant", "channel")
    with pytest.raises(InvalidMessage, match="sealed"):
        cipher.open(sealed, *context)


def test_no_byte_of_it_can_be_changed(cipher: Cipher) -> None:
    sealed = cipher.seal("secret", "credentials")
    for n in range(len(sealed)):
        changed = sealed[:n] + bytes([sealed[n] ^ 1]) + sealed[n + 1 :]
        with pytest.raises((InvalidMessage, RuntimeError)):
            cipher.open(changed, "credentials")
    for short in (b"", sealed[:4], sealed[:12], sealed[:-1]):
        with pytest.raises(InvalidMessage):
            cipher.open(short, "credentials")


def test_another_master_key_is_distinguished_from_a_changed_value(cipher: Cipher) -> None:
    sealed = Cipher(base64.b64encode(os.urandom(32)).decode()).seal("secret", "credentials")
    with pytest.raises(RuntimeError, match="sealed under another master key"):
        cipher.open(sealed, "credentials")


@pytest.mark.parametrize("text", ["", "short", base64.b64encode(b"x" * 31).decode(), "!" * 44, "ü" * 44])
def test_a_malformed_master_key_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(ValueError, match="base64 of 32 bytes") as refused:
        read_key(text)
    assert not text or text not in str(refused.value)


def test_a_data_key_binds_its_content_too() -> None:
    key = DataKey(bytes(32))
    sealed = key.seal("текст", "event", "field")
    assert key.open(sealed, "event", "field") == "текст"
    for wrong_key, context in ((key, ("event", "other")), (DataKey(bytes([1] * 32)), ("event", "field"))):
        with pytest.raises(InvalidMessage):
            wrong_key.open(sealed, *context)
    with pytest.raises(InvalidMessage):
        key.open(b"", "event", "field")
