"""The content of a backup: parts of any length, one after the other, and then the manifest that describes them.

Inside the sealed stream stand frames: ``kind 1 byte | length 4 bytes | content``. The first frame has the version of
the format. A part is a frame with its name, frames with its bytes, and a frame for its end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import IO

import msgspec

from infra.errors import InvalidMessage
from infra.security.sealed_stream import CHUNK_BYTES, SealedWriter, read_sealed
from tooling.stack.engines.base import EngineError

FORMAT = 2
"""The version of this format. Code reads the versions up to its own. 2: a backup may have the part `BASE`."""
KEYS = "keys"
"""The part with the files of the keys."""
BASE = "base"
"""The part with the data folder of the database, if its WAL is archived."""
_FORMAT, _PART, _BYTES, _END, _MANIFEST = b"F", b"P", b"B", b"E", b"M"
_HEAD_BYTES = 5


class Part(msgspec.Struct, frozen=True):
    """One part of a backup."""

    name: str
    size: int
    """Bytes."""
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """The description of a backup, in its last frame."""

    format: int
    code: str
    """The version of the code that made it."""
    at: datetime
    """The moment of the database's snapshot: later facts are not in the backup."""
    finished_at: datetime
    postgres: str
    """The version of the server."""
    migrations: dict[str, str]
    """Service → the revision of its tables."""
    kernel_steps: list[str]
    """The files in infra/postgres/kernel that were applied."""
    engines: dict[str, str | None]
    """Engine → its version. Null: it did not answer."""
    objects: dict[str, int]
    """Bucket → the number of its objects."""
    rebuilt: dict[str, str]
    """Engine → how its content is made again; it is not in the backup."""
    parts: list[Part]
    archive: str = ""
    """The folder or URL of the archive of the WAL; empty: the backup has no part `BASE`."""
    tls: bool = False
    """The local stack used TLS between its parts. Backups from before this field do not know it."""


class BackupWriter:
    """Writes a backup into `file`. Calls in this order: for each part `begin`, `write`, `end`; then `finish`."""

    def __init__(self, file: IO[bytes], key: bytes) -> None:
        self._sealed = SealedWriter(file, key)
        self._frame(_FORMAT, str(FORMAT).encode())
        self.parts: list[Part] = []

    def begin(self, name: str) -> None:
        self._name, self._size, self._digest = name, 0, hashlib.sha256()
        self._frame(_PART, name.encode())

    def write(self, content: bytes) -> None:
        self._size += len(content)
        self._digest.update(content)
        self._frame(_BYTES, content)

    def end(self) -> None:
        self._frame(_END, b"")
        self.parts.append(Part(self._name, self._size, self._digest.hexdigest()))

    def finish(self, manifest: Manifest) -> None:
        """Writes the manifest and the end of the stream. The caller closes the file."""
        self._frame(_MANIFEST, msgspec.json.encode(manifest))
        self._sealed.close()

    def _frame(self, kind: bytes, content: bytes) -> None:
        self._sealed.write(kind + len(content).to_bytes(4, "big"))
        self._sealed.write(content)


class BackupReader:
    """Reads a backup from `file`. `where` names it in errors.

    Raises EngineError if the backup is damaged, cut off, sealed under another key, or of a newer format.
    """

    def __init__(self, file: IO[bytes], key: bytes, where: str) -> None:
        self._stream = read_sealed(file, key)
        self._where = where
        self._buffer = bytearray()
        self._parts: list[Part] = []
        self.manifest: Manifest | None = None
        """Known after the last part."""

    def parts(self) -> Iterator[tuple[str, Iterator[bytes]]]:
        """(name, content) of each part. The content of a part that was not read is read before the next part."""
        kind, content = self._frame()
        if kind != _FORMAT or not content.isdigit() or int(content) > FORMAT:
            version = content.decode(errors="replace") if kind == _FORMAT else "unknown"
            reason = f"has version {version} of the format, and this code reads {FORMAT}: use newer code"
            raise self._refusal(reason)
        while True:
            kind, content = self._frame()
            if kind == _MANIFEST:
                self._end(content)
                return
            if kind != _PART:
                raise self._refusal("has parts in a wrong order")
            pieces = self._content(content.decode())
            yield content.decode(), pieces
            for _ in pieces:
                pass

    def _content(self, name: str) -> Iterator[bytes]:
        digest, size = hashlib.sha256(), 0
        while True:
            kind, content = self._frame()
            if kind == _END:
                self._parts.append(Part(name, size, digest.hexdigest()))
                return
            if kind != _BYTES:
                raise self._refusal("has parts in a wrong order")
            size += len(content)
            digest.update(content)
            yield content

    def _end(self, content: bytes) -> None:
        try:
            manifest = msgspec.json.decode(content, type=Manifest)
        except msgspec.DecodeError as error:
            raise self._refusal(f"has a damaged manifest ({error})") from error
        if manifest.parts != self._parts:
            raise self._refusal("has parts that are not those of its manifest")
        if self._buffer or self._more():
            raise self._refusal("goes on after its manifest")
        self.manifest = manifest

    def _frame(self) -> tuple[bytes, bytes]:
        head = self._take(_HEAD_BYTES)
        length = int.from_bytes(head[1:], "big")
        if length > CHUNK_BYTES:
            raise self._refusal("has a frame that is too long")
        return head[:1], self._take(length)

    def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            if not self._more():
                raise self._refusal("ends before its manifest")
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _more(self) -> bool:
        """Reads on. False at the end of the stream."""
        try:
            piece = next(self._stream, None)
        except InvalidMessage as error:
            raise self._refusal(error.reason) from error
        self._buffer += piece or b""
        return piece is not None

    def _refusal(self, reason: str) -> EngineError:
        return EngineError(f"{self._where}: the backup {reason}")


def verify(file: IO[bytes], key: bytes, where: str, tell: Callable[[int], None]) -> tuple[Manifest, bytes]:
    """Reads the whole backup. Returns its manifest and the content of the part `KEYS`. Calls `tell` with sizes.

    Raises EngineError as `BackupReader`.
    """
    reader = BackupReader(file, key, where)
    keys = b""
    for name, pieces in reader.parts():
        for piece in pieces:
            tell(len(piece))
            if name == KEYS:
                keys += piece
    assert reader.manifest is not None
    return reader.manifest, keys
