"""Takes a backup of a stack while it runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from infra import VERSION
from infra.clock import utcnow
from infra.stores.objects import BUCKET as MEDIA
from services.log_aggregator.audit.stored_heads import BUCKET as AUDIT_HEADS
from tooling.stack import operator
from tooling.stack.backup import database, keys, objects
from tooling.stack.backup.parts import BASE, FORMAT, KEYS, BackupWriter, Manifest
from tooling.stack.backup.targets import named_store_errors
from tooling.stack.backup.wal import Archive
from tooling.stack.engines import certificates, postgres
from tooling.stack.engines.base import EngineError
from tooling.stack.home import Home, home_folder
from tooling.stack.services import KEYS_FOLDER

DATABASE = "database"
OBJECTS = "objects/"
"""The names of the parts with the objects of a bucket begin with it."""
# Not in a backup: engine → how its content is made again.
REBUILT = {
    "valkey": "limits and live messages only; nothing to make again",
    "kafka": "sent again from the outboxes",
    "rabbitmq": "sent again from the outboxes",
    "milvus": "filled again from the database",
    "opensearch": "filled again from Kafka; log lines and spans from before are lost",
}

Tell = Callable[[str, int], None]
"""Called with the name of a part and a number of bytes that were read."""


@dataclass(frozen=True)
class Source:
    """The parts of a stack that a backup has."""

    database_url: str
    s3: dict[str, str]
    """endpoint, access_key, secret_key."""
    keys: Path
    home: Path | None
    """None in containers."""
    socket: Path | None
    """The folder of the database's socket, if the programs of PostgreSQL cannot use its port."""
    archive: Archive | None
    """The archive of the WAL, if there is one."""
    tls: bool
    """The parts of a local stack use TLS. That of containers is in their files."""


def source() -> Source:
    """The stack of this machine, or the containers that the environment names.

    Raises EngineError if no stack was ever started here.
    """
    if url := os.environ.get("CLAW_ADMIN_DATABASE_URL"):
        try:
            names = {name: os.environ[f"CLAW_S3_{name.upper()}"] for name in ("endpoint", "access_key", "secret_key")}
            return Source(url, names, Path(os.environ["CLAW_KEYS_FOLDER"]), None, None, None, False)
        except KeyError as error:
            raise EngineError(f"{error.args[0]}: must be set in the environment") from None
    home = Home(home_folder())
    access = operator.engines_access()
    if "s3" not in access or "postgres" not in access:
        raise EngineError(f"{home.path}: the stack was never started completely. Start it with ./claw up")
    place, keys_folder, archive = home.place(), home.path / KEYS_FOLDER, known_archive(home.path)
    url, socket, tls = access["postgres"]["url"], postgres.socket_folder(place), certificates.in_use(place)
    return Source(url, access["s3"], keys_folder, home.path, socket, archive, tls)


def known_archive(home: Path) -> Archive | None:
    """The archive of the stack's WAL; None if its WAL is not archived."""
    file = home / postgres.ARCHIVE
    return msgspec.json.decode(file.read_bytes(), type=Archive) if file.exists() else None


def part_of(bucket: str) -> str:
    """The name of the part with a bucket's objects."""
    return f"{OBJECTS}{bucket}"


def bucket_of(part: str) -> str:
    """The bucket of such a part."""
    return part.removeprefix(OBJECTS)


async def take(found: Source, writer: BackupWriter, engines: dict[str, str | None], tell: Tell) -> Manifest:
    """Writes all parts and the manifest.

    The database is one snapshot. The heads of the audit chains are read before it, so that the restored chains have all
    of them; files are read after it, so that the files of all of its rows are there.
    """
    counts: dict[str, int] = {}
    store = objects.client(**found.s3)

    def bucket(name: str) -> None:
        counts[name] = 0

        def count() -> None:
            counts[name] += 1

        with named_store_errors("the stack's files"):
            _part(writer, part_of(name), objects.export(store, name, count), tell)

    bucket(AUDIT_HEADS)
    before = keys.read(found.keys, found.home)
    async with database.snapshot(found.database_url) as taken:
        files = keys.merge(before, keys.read(found.keys, found.home))
        _part(writer, KEYS, [msgspec.json.encode(files)], tell)
        _part(writer, DATABASE, database.dump(found.database_url, taken, found.socket), tell)
    if found.archive:
        _part(writer, BASE, database.base(found.database_url, found.socket), tell)
    bucket(MEDIA)
    manifest = Manifest(
        format=FORMAT,
        code=VERSION,
        at=taken.at,
        finished_at=utcnow(),
        postgres=taken.server,
        migrations=taken.migrations,
        kernel_steps=taken.kernel_steps,
        engines=engines,
        objects=counts,
        rebuilt=REBUILT,
        parts=writer.parts,
        archive=found.archive.to if found.archive else "",
        tls=found.tls,
    )
    writer.finish(manifest)
    return manifest


def _part(writer: BackupWriter, name: str, pieces: Iterable[bytes], tell: Tell) -> None:
    writer.begin(name)
    for piece in pieces:
        writer.write(piece)
        tell(name, len(piece))
    writer.end()
