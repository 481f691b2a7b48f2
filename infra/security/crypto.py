"""Sealed values: AES-256-GCM (NIST SP 800-38D) under keys that HKDF (RFC 5869) derives from the master key.

A sealed value is ``version 1 byte | key id 4 bytes | nonce 12 bytes | ciphertext and tag``. The key id identifies the
master key: after a change of the key, older values open with the older key until they are sealed again.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from infra.errors import InvalidMessage
from infra.security.watched import Watched

KEY_BYTES = 32
_VERSION = b"\x01"
_HEADER_BYTES = 5
_NONCE_BYTES = 12


class _MasterKey:
    def __init__(self, key: bytes) -> None:
        self._key = key
        self.id = self._derived("key id")[:4]
        # There are only a few purposes; the cache is bounded nevertheless.
        self.of = lru_cache(maxsize=64)(lambda purpose: AESGCM(self._derived(f"seal {purpose}")))

    def _derived(self, info: str) -> bytes:
        return HKDF(SHA256(), KEY_BYTES, salt=None, info=f"clawbus {info}".encode()).derive(self._key)


class Cipher:
    """Seals under the first of the service's master keys, and opens with all of them.

    `master_keys`: a text (see `read_keys`), or the file that holds it and is read again when it is replaced. Raises
    ValueError for any other text.
    """

    def __init__(self, master_keys: str | Path) -> None:
        self._file = Watched(master_keys, _read_file) if isinstance(master_keys, Path) else None
        self._version = 0
        self._set(self._file.content if self._file else read_keys(master_keys))  # type: ignore[arg-type]

    def _set(self, keys: Sequence[bytes]) -> None:
        found = [_MasterKey(key) for key in keys]
        self._first = found[0]
        self._by_id = {key.id: key for key in found}

    def _look(self, *, now: bool = False) -> None:
        if self._file:
            self._file.look(now=now)
            if self._version != self._file.version:
                self._version = self._file.version
                self._set(self._file.content)

    @property
    def key_id(self) -> bytes:
        """The id of the key that seals now."""
        self._look(now=True)
        return self._first.id

    def seal(self, content: str | bytes, purpose: str, *context: str) -> bytes:
        """Encrypts `content`. Only `open` with the same purpose and context returns it.

        purpose: a fixed phrase with a key of its own (``channel credentials``).
        context: the owner of the value (tenant, id, field); bound to the value and not stored with it.
        """
        self._look()
        header = _VERSION + self._first.id
        return header + _seal(self._first.of(purpose), content, header, purpose, *context)

    def open(self, sealed: bytes, purpose: str, *context: str) -> bytes:
        """The content of a sealed value.

        Raises InvalidMessage if the value was changed, or sealed for another purpose or context; RuntimeError if it was
        sealed under another master key, because then the process has a wrong configuration.
        """
        header = sealed[:_HEADER_BYTES]
        id_ = header[1:]
        if id_ not in self._by_id:
            # Another process may have sealed it under a new key just now.
            self._look(now=True)
        if id_ not in self._by_id and len(header) == _HEADER_BYTES and header.startswith(_VERSION):
            raise RuntimeError("value was sealed under another master key than those of this process")
        return _open(self._by_id.get(id_, self._first).of(purpose), sealed[_HEADER_BYTES:], header, purpose, *context)


class DataKey:
    """Seals under a random key of its own, which is stored sealed (see `infra.security.subjects`)."""

    def __init__(self, key: bytes) -> None:
        self._key = AESGCM(key)
        self._digest_key = hashlib.blake2b(b"digest", key=key).digest()

    def digest(self, content: str) -> bytes:
        """Equal for equal contents. Without the key it does not show whether a guess is right."""
        return hashlib.blake2b(content.encode(), key=self._digest_key, digest_size=16).digest()

    def seal(self, content: str, *context: str) -> bytes:
        """Encrypts `content`; `context` (tenant, subject, event id, field) is bound to it and not stored with it."""
        return _VERSION + _seal(self._key, content, _VERSION, *context)

    def open(self, sealed: bytes, *context: str) -> str:
        """The content of a sealed value. Raises InvalidMessage if it was changed, or sealed for another context."""
        return _open(self._key, sealed[1:], sealed[:1], *context).decode()


def read_keys(text: str) -> list[bytes]:
    """The keys of a text with one or more words, each the base64 of 32 bytes. Raises ValueError; does not show it."""
    return [read_key(word) for word in text.split() or [""]]


def _read_file(path: Path) -> list[bytes]:
    try:
        return read_keys(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: each line {error}") from None


def read_key(text: str) -> bytes:
    """The 32 bytes whose base64 is `text`. Raises ValueError for any other text, and does not show it."""
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise ValueError(f"must be the base64 of {KEY_BYTES} bytes")
    return key


def _seal(key: AESGCM, content: str | bytes, header: bytes, *context: str) -> bytes:
    nonce = os.urandom(_NONCE_BYTES)
    data = content.encode() if isinstance(content, str) else content
    return nonce + key.encrypt(nonce, data, _associated(header, context))


def _open(key: AESGCM, sealed: bytes, header: bytes, *context: str) -> bytes:
    try:
        return key.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _associated(header, context))
    except (InvalidTag, ValueError):
        raise InvalidMessage("sealed", "was changed, or was sealed for another purpose or context") from None


def _associated(header: bytes, context: tuple[str, ...]) -> bytes:
    # Encoded as JSON, because ("a", "bc") and ("ab", "c") must differ.
    return header + msgspec.json.encode(context)
