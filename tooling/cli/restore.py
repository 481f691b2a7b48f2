"""``./claw restore``: verifies a backup as a whole, and then makes the stack of it."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from infra.postgres.db import is_transient
from infra.postgres.schema import Passwords, prepare_roles
from infra.security.audit import audit
from services.memory.handlers import enqueue
from tooling.cli.backup import claw, progress, teller
from tooling.stack import operator
from tooling.stack.backup import database, keys, objects, take
from tooling.stack.backup.keyfile import key_path, known_key
from tooling.stack.backup.parts import KEYS, BackupReader, Manifest, verify
from tooling.stack.backup.targets import opened, reaching
from tooling.stack.engines.base import EngineError
from tooling.stack.home import SERVICES, UNFINISHED, Home, home_folder
from tooling.stack.services import KEYS_FOLDER, passwords

out = Console(highlight=False)


class Restored(msgspec.Struct, frozen=True):
    """A restored backup, as `restore --json` prints it."""

    file: str
    home: str
    """The state folder, or ``the containers``."""
    objects: dict[str, int]
    """Bucket → the number of restored objects."""
    messages: int
    """Kept messages of the outboxes, which the relays send again."""
    seconds: float
    manifest: Manifest


def restore(
    file: Annotated[str, typer.Argument(help="The backup: a path, or s3://bucket/key.")],
    wipe: Annotated[bool, typer.Option("--wipe", help="Delete the data that this stack has.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Verify the backup and change nothing.")] = False,
    no_start: Annotated[bool, typer.Option("--no-start", help="A trial: start no service, so that none acts.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Make this stack the one of a backup, and start it. A stack that has data is refused, unless --wipe is given."""
    began = time.monotonic()
    key = known_key()
    with progress() as bars, opened(file) as stream, reaching(file):
        task = bars.add_task("verify", total=None)
        try:
            manifest, kept = verify(stream, key, file, lambda size: bars.advance(task, size))
        except EngineError as error:
            raise EngineError(f"{error}. Nothing was changed") from error
    database.check_versions(manifest, file)
    if check:
        _tell_check(file, manifest, as_json)
        return
    files = msgspec.json.decode(kept, type=list[keys.KeyFile])
    if os.environ.get("CLAW_ADMIN_DATABASE_URL"):
        where, start, no_start = "the containers", "docker compose up -d", True
        counts, messages = _into_containers(file, key, manifest, files, wipe)
    else:
        where, start = str(home_folder()), "./claw up"
        counts, messages = _into_home(Home(home_folder()), file, key, manifest, files, wipe)
        if not no_start:
            _claw("up")
    seconds = round(time.monotonic() - began, 1)
    if as_json:
        done = Restored(file, where, counts, messages, seconds, manifest)
        print(msgspec.json.encode(done).decode())  # noqa: T201
        return
    out.print(f"{where}: the state of {manifest.at:%Y-%m-%d %H:%M:%S} UTC, after {seconds} s.", soft_wrap=True)
    out.print(f"{sum(counts.values())} files are restored. The relays send {messages} kept messages again.")
    if no_start:
        out.print(f"No service runs. To start them, so that they answer: {start}")


def _tell_check(file: str, manifest: Manifest, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(manifest).decode())  # noqa: T201
        return
    at = f"{manifest.at:%Y-%m-%d %H:%M:%S} UTC"
    out.print(f"{file} is complete: the state of {at}, by version {manifest.code}", soft_wrap=True)
    for part in manifest.parts:
        out.print(f"  {part.name:<24} {part.size / 1e6:10.1f} MB  sha256 {part.sha256}", soft_wrap=True)


def _into_home(
    home: Home, file: str, key: bytes, manifest: Manifest, files: list[keys.KeyFile], wipe: bool
) -> tuple[dict[str, int], int]:
    """Restores into the state folder, and lets PostgreSQL and the object store run. Returns as `_parts`."""
    if not wipe and _has_data(home):
        raise EngineError(
            f"{home.path}: this stack has data. Restore into another CLAW_HOME, or delete the data with --wipe. "
            "Nothing was changed"
        )
    for path in (Path(file).absolute(), key_path()):
        if path.is_relative_to(home.path):
            raise EngineError(f"{path}: move it out of {home.path}, which is made empty first. Nothing was changed")
    _make_empty(home, files)
    _claw("up", "--only", "postgres,s3")
    done = operator.run(_restore(home, file, key, manifest))
    (home.path / UNFINISHED).unlink()
    return done


def _has_data(home: Home) -> bool:
    """False if the stack was never started, its restore was interrupted, or its database runs and has no tenant."""
    if (home.path / UNFINISHED).exists() or not (home.path / "postgres" / "data").exists():
        return False
    try:
        return asyncio.run(database.has_tenants(operator.engines_access()["postgres"]["url"]))
    except (EngineError, KeyError):
        return True
    except Exception as error:
        if not is_transient(error):
            raise
        # The database is down, so its tenants are not known.
        return True


def _make_empty(home: Home, files: list[keys.KeyFile]) -> None:
    """Deletes everything but the ports of the stack, and writes the keys and passwords of the backup."""
    ports = home.path / "ports.json"
    kept = [keys.KeyFile(ports.name, 0o600, ports.read_text())] if ports.exists() else []
    if home.path.exists():
        _claw("down", "--wipe")
    home.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    keys.restore([keys.KeyFile(UNFINISHED, 0o600, ""), *kept, *files], home.path / KEYS_FOLDER, home.path)


async def _restore(home: Home, file: str, key: bytes, manifest: Manifest) -> tuple[dict[str, int], int]:
    place = home.place()
    found = take.source()
    # The roles of services that the backup does not know are made at the next start.
    known = [name for name in SERVICES if place.secret.known(f"postgres.{name}.owner")]
    await prepare_roles(found.database_url, {name: Passwords(**passwords(place, name)) for name in known})
    return await _parts(found, file, key, manifest)


def _into_containers(
    file: str, key: bytes, manifest: Manifest, files: list[keys.KeyFile], wipe: bool
) -> tuple[dict[str, int], int]:
    """Restores into the stores that the environment names, after the provisioning. Returns as `_parts`."""
    found = take.source()
    if wipe or operator.run(database.has_tenants(found.database_url)):
        raise EngineError(
            "the database has data, and so have the other volumes: delete them (docker compose down --volumes), start "
            "the provisioning (docker compose up -d provision), and restore without --wipe. Nothing was changed"
        )
    keys.restore(files, found.keys, None)

    async def restored() -> tuple[dict[str, int], int]:
        await database.drop_schemas(found.database_url, SERVICES)
        return await _parts(found, file, key, manifest)

    return operator.run(restored())


async def _parts(found: take.Source, file: str, key: bytes, verified: Manifest) -> tuple[dict[str, int], int]:
    """Restores all parts but the keys. Returns the objects by bucket, and the number of messages to send again."""
    url, store, counts = found.database_url, objects.client(**found.s3), {}
    with progress() as bars, opened(file) as stream, reaching(file):
        reader, tell = BackupReader(stream, key, file), teller(bars)
        for name, pieces in reader.parts():
            told = _told(pieces, name, tell)
            if name == take.DATABASE:
                database.restore(url, told)
            elif name != KEYS:
                bucket = take.bucket_of(name)
                counts[bucket] = objects.restore(store, bucket, told)
    if reader.manifest != verified:
        raise EngineError(f"{file}: has changed since it was verified. Restore another backup")
    messages = await database.send_all_again(url)
    async with operator.database(url, "log_aggregator") as chains, chains.begin() as tx:
        audit(tx, operator.actor(), "stack.restore", "backup", file, at=verified.at.isoformat())
    await _wake_index(url)
    return counts, messages


def _told(pieces: Iterator[bytes], name: str, tell: take.Tell) -> Iterator[bytes]:
    for piece in pieces:
        tell(name, len(piece))
        yield piece


async def _wake_index(url: str) -> None:
    """Lets the memory service put one document into its index: it notices that Milvus is empty, and fills it."""
    async with operator.database(url, "memory") as memory:
        async with memory.begin() as tx:
            rows = await tx.sql(
                "SELECT tenant_id, id FROM document WHERE status = 'indexed' AND deleted_at IS NULL LIMIT 1"
            )
        for tenant_id, document_id in rows:
            async with memory.begin(tenant_id=tenant_id) as tx:
                enqueue(tx, document_id, "fill")


def _claw(*arguments: str) -> None:
    """Runs a command that starts or stops processes. Its lines go to stderr."""
    if claw(*arguments, stdout=sys.stderr).returncode:
        raise EngineError(f"./claw {' '.join(arguments)} failed; the lines above say why")
