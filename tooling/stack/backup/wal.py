"""The archive of the database's WAL: a sealed file for each segment, in a folder or an object store.

PostgreSQL calls this program for each segment (``archive_command``, see its page "Continuous Archiving and
Point-in-Time Recovery"); `recovery` reads them. The files of a database are in a place of its own, named after its
system identifier. No file is overwritten. Beside the WAL stand the files of the keys, as often as they change: without
the keys of that time, restored rows could not be read.

    python -m tooling.stack.backup.wal ARCHIVE HOME PATH NAME       in the data folder of the database
"""

from __future__ import annotations

import hashlib
import re
import sys
import zlib
from datetime import datetime
from pathlib import Path
from typing import IO

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from infra.errors import InvalidMessage
from infra.security.sealed_stream import SealedWriter, read_sealed
from tooling.stack.backup import keys
from tooling.stack.backup.targets import Target, named_store_errors, target_with_access
from tooling.stack.engines.base import EngineError
from tooling.stack.services import KEYS_FOLDER

_SEGMENT = re.compile(r"[0-9A-F]{24}")
_HISTORY = re.compile(r"([0-9A-F]{8})\.history")
_KEYS = "keys-"


class Archive(msgspec.Struct, frozen=True):
    """The place of an archive and the access to it, as in the stack's ``archive.json``."""

    to: str
    """A folder, or ``s3://bucket/prefix``."""
    secret: str
    """From the stack's passwords, which are in each backup. The key is derived from it."""
    store: dict[str, str]
    """The access to the object store; empty for a folder."""

    def of(self, system: int) -> Target:
        """The part of one database. `system`: its system identifier."""
        return target_with_access(f"{self.to.rstrip('/')}/wal-{system}", self.store)

    def key(self) -> bytes:
        return HKDF(SHA256(), 32, salt=None, info=b"clawbus archive of WAL").derive(self.secret.encode())


class _Head(msgspec.Struct, frozen=True):
    """The first line of a file of the archive: a file under another name, or of another database, is refused."""

    system: int
    name: str


def system_of(data: Path) -> int:
    """The system identifier of the database in this data folder: the first field of its control file."""
    return int.from_bytes((data / "global" / "pg_control").read_bytes()[:8], sys.byteorder)


def push(archive: Archive, system: int, name: str, content: bytes) -> None:
    """Stores a file, unless it is stored already. Raises EngineError if another content is stored under its name."""
    place, key = archive.of(system), archive.key()
    with place.read(name) as stored:
        if stored is not None:
            if _content(stored, key, _Head(system, name), place.where(name)) != content:
                raise EngineError(f"{place.where(name)}: exists with another content and is not overwritten")
            return
    with place.new(name) as file:
        sealed = SealedWriter(file, key)
        sealed.write(msgspec.json.encode(_Head(system, name)) + b"\n" + zlib.compress(content, 1))
        sealed.close()


def push_keys(archive: Archive, system: int, home: Path) -> None:
    """Stores the files of the keys, if they have changed."""
    content = msgspec.json.encode(keys.read(home / KEYS_FOLDER, home))
    push(archive, system, f"{_KEYS}{hashlib.sha256(content).hexdigest()}", content)


def pull(archive: Archive, system: int, name: str) -> bytes | None:
    """The content of a file; None if it is not in the archive. Raises EngineError if it is damaged or another file."""
    place = archive.of(system)
    with place.read(name) as stored:
        return None if stored is None else _content(stored, archive.key(), _Head(system, name), place.where(name))


def key_files(archive: Archive, system: int, first: list[keys.KeyFile]) -> list[keys.KeyFile]:
    """The newest key files of the archive, with all master keys since those of the backup, `first`."""
    stored = archive.of(system).stored()
    for name in sorted((name for name in stored if name.startswith(_KEYS)), key=lambda name: stored[name]):
        content = pull(archive, system, name)
        if content is not None:
            first = keys.merge(first, msgspec.json.decode(content, type=list[keys.KeyFile]))
    return first


def is_segment(name: str) -> bool:
    return bool(_SEGMENT.fullmatch(name))


def segments(archive: Archive, system: int) -> list[str]:
    """The names of all segments, in order."""
    return sorted(filter(is_segment, archive.of(system).stored()))


def timeline(archive: Archive, system: int, at: datetime) -> str:
    """The timeline that the database had at that moment, as PostgreSQL's setting ``recovery_target_timeline``.

    Each restore to a moment begins a timeline, whose history is archived at the start. Before that the database had
    the one before, or that of the base. PostgreSQL's default, the newest one, would leave out the changes that a
    later restore has undone.
    """
    stored = archive.of(system).stored()
    began = [int(found[1], 16) for name in stored if stored[name] <= at and (found := _HISTORY.fullmatch(name))]
    return str(max(began)) if began else "current"


def prune(archive: Archive, system: int, before: datetime) -> int:
    """Removes the WAL that was archived before this time. Returns the number of files."""
    place = archive.of(system)
    # The keys stay, and so does the history of a timeline: it tells a later recovery which number is free.
    old = [name for name, at in place.stored().items() if at < before and _SEGMENT.match(name)]
    for name in sorted(old):
        place.remove(name)
    return len(old)


def _content(file: IO[bytes], key: bytes, head: _Head, where: str) -> bytes:
    try:
        first, _, packed = b"".join(read_sealed(file, key)).partition(b"\n")
    except InvalidMessage as error:
        raise EngineError(f"{where}: the file {error.reason}") from error
    found = msgspec.json.decode(first, type=_Head)
    if found != head:
        raise EngineError(f"{where}: is {found.name} of the database {found.system}")
    return zlib.decompress(packed)


def main(archive_file: str, home: str, path: str, name: str) -> int:
    """Archives a file. Returns the exit code. An error is printed for PostgreSQL's log."""
    archive = msgspec.json.decode(Path(archive_file).read_bytes(), type=Archive)
    system = system_of(Path())
    try:
        with named_store_errors(archive.to):
            # The keys first: values in the segment are sealed under them.
            push_keys(archive, system, Path(home))
            push(archive, system, name, Path(path).read_bytes())
    except (EngineError, OSError) as error:
        print(f"could not archive {name}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
