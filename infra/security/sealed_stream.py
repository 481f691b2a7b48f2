"""Sealed streams of any length: AES-256-GCM in chunks, in the STREAM construction (Hoang and others, eprint 2015/189).

``header | sealed chunk | … | last sealed chunk``. The header is ``CLAWSEAL | version 1 byte | key id 8 bytes | salt 32
bytes``. Each chunk but the last has 1 MiB of content. As in age (C2SP agead), the key is derived for this stream from
the salt, and the nonce of a chunk is its number (11 bytes) and a byte that is 1 for the last chunk only. So a chunk
that was changed, moved, left out or added does not open, and neither does a stream that was cut off, also at the border
of a chunk. The header is the associated data of each chunk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import IO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from infra.errors import InvalidMessage

CHUNK_BYTES = 1024 * 1024
TAG_BYTES = 16
_MAGIC = b"CLAWSEAL"
_VERSION = 1
_ID_BYTES = 8
_SALT_BYTES = 32
HEADER_BYTES = len(_MAGIC) + 1 + _ID_BYTES + _SALT_BYTES


class SealedWriter:
    """Seals the bytes that are written to it, into `file`, with one chunk in memory. Unreadable before `close`."""

    def __init__(self, file: IO[bytes], key: bytes) -> None:
        """`key`: 32 bytes; every stream under it has a key of its own."""
        salt = os.urandom(_SALT_BYTES)
        self._header = _MAGIC + bytes([_VERSION]) + key_id(key) + salt
        self._aead = _stream_key(key, salt)
        self._file = file
        self._waiting = bytearray()
        self._number = 0
        file.write(self._header)

    def write(self, content: bytes) -> None:
        self._waiting += content
        # The last chunk is sealed in another way, so a full one waits until more content follows.
        while len(self._waiting) > CHUNK_BYTES:
            self._seal(bytes(self._waiting[:CHUNK_BYTES]), last=False)
            del self._waiting[:CHUNK_BYTES]

    def close(self) -> None:
        """Writes the last chunk. The caller closes the file."""
        self._seal(bytes(self._waiting), last=True)

    def _seal(self, content: bytes, *, last: bool) -> None:
        self._file.write(self._aead.encrypt(_nonce(self._number, last), content, self._header))
        self._number += 1


def read_sealed(file: IO[bytes], key: bytes) -> Iterator[bytes]:
    """The content of a sealed stream in pieces of at most 1 MiB. The end of `file` must be the end of the stream.

    Raises InvalidMessage (field ``sealed``) if it is not a sealed stream, has a newer version, was sealed under another
    key, was changed, or was cut off. Pieces that were returned before that are as they were written.
    """
    header = _read(file, HEADER_BYTES)
    if header[: len(_MAGIC)] != _MAGIC[: len(header)] or not header:
        raise InvalidMessage("sealed", "is not a sealed stream")
    if len(header) < HEADER_BYTES:
        raise InvalidMessage("sealed", "is cut off in its header")
    version = header[len(_MAGIC)]
    if version != _VERSION:
        raise InvalidMessage("sealed", f"has version {version} of the encryption, and this code reads {_VERSION}")
    id_, salt = header[len(_MAGIC) + 1 : -_SALT_BYTES], header[-_SALT_BYTES:]
    if id_ != key_id(key):
        raise InvalidMessage("sealed", f"was sealed under the key {id_.hex()}, and this is the key {key_id(key).hex()}")
    aead = _stream_key(key, salt)
    number, sealed = 0, _read(file, CHUNK_BYTES + TAG_BYTES)
    while True:
        following = _read(file, CHUNK_BYTES + TAG_BYTES)
        try:
            yield aead.decrypt(_nonce(number, not following), sealed, header)
        except (InvalidTag, ValueError):
            place = HEADER_BYTES + number * (CHUNK_BYTES + TAG_BYTES)
            raise InvalidMessage("sealed", f"was changed or cut off after byte {place}") from None
        if not following:
            return
        number, sealed = number + 1, following


def key_id(key: bytes) -> bytes:
    """8 bytes that name the key and tell nothing about it."""
    return HKDF(SHA256(), _ID_BYTES, salt=None, info=b"clawbus sealed stream key id").derive(key)


def _stream_key(key: bytes, salt: bytes) -> AESGCM:
    return AESGCM(HKDF(SHA256(), 32, salt=salt, info=b"clawbus sealed stream").derive(key))


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])


def _read(file: IO[bytes], count: int) -> bytes:
    """`count` bytes, or those that are left. One read of a network stream may return less."""
    pieces = []
    while count and (piece := file.read(count)):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)
