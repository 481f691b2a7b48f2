"""``./claw restore``: verifies a whole backup, and then restores it into the stack."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import typer
from rich.console import Console

from infra.clock import utcnow
from infra.postgres.db import is_transient
from infra.postgres.schema import Passwords, prepare_roles
from infra.security.audit import audit
from services.log_aggregator.audit.stored_heads import BUCKET as AUDIT_HEADS
from services.memory.indexes.filling import refill
from services.memory.indexes.models import active_key
from tooling.cli.backup import run_claw
from tooling.cli.output import Json, Progress, print_json
from tooling.stack import operator
from tooling.stack.backup import database, keys, objects, take
from tooling.stack.backup.keyfile import key_path, known_key
from tooling.stack.backup.parts import BASE, BackupReader, Manifest, verify
from tooling.stack.backup.recovery import recovered
from tooling.stack.backup.targets import named_store_errors, open_backup, store_access
from tooling.stack.backup.wal import Archive, key_files, system_of
from tooling.stack.engines.base import EngineError, make_folder
from tooling.stack.engines.postgres import ARCHIVE
from tooling.stack.home import PORTS, SERVICES, UNFINISHED, Home, home_folder
from tooling.stack.privileges import stack_user
from tooling.stack.services import KEYS_FOLDER, passwords
from tooling.stack.supervisor import Supervisor

out = Console(highlight=False)


class Restored(msgspec.Struct, frozen=True):
    """A restored backup, as `restore --json` prints it."""

    file: str
    home: str
    """The state folder, or ``the containers``."""
    at: datetime
    """The moment whose state it has."""
    objects: dict[str, int]
    """Bucket → the number of restored objects."""
    messages: int
    """Kept messages of the outboxes, which the relays send again."""
    seconds: float
    manifest: Manifest


class _Backup(NamedTuple):
    """A verified backup."""

    file: str
    """A path or URL."""
    key: bytes
    manifest: Manifest
    files: list[keys.KeyFile]


def restore(
    file: Annotated[str, typer.Argument(help="The backup: a path, or s3://bucket/key.")],
    wipe: Annotated[bool, typer.Option("--wipe", help="Delete the data that this stack has.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Verify the backup and change nothing.")] = False,
    at: Annotated[
        str, typer.Option(help="Restore to this moment after the backup, with archived WAL: 2026-11-30T14:59:59Z.")
    ] = "",
    archive: Annotated[str, typer.Option(help="With --at: the place of the archive, if it was moved.")] = "",
    no_start: Annotated[
        bool, typer.Option("--no-start", help="For a trial: start no service, so that nothing is sent.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Restore a backup into this stack, and start it. A stack that has data is refused, unless --wipe is given."""
    began = time.monotonic()
    key = known_key()
    with Progress() as progress, open_backup(file) as stream, named_store_errors(file):
        try:
            manifest, kept = verify(stream, key, file, partial(progress.add, "verify the backup"))
        except EngineError as error:
            raise EngineError(f"{error}. Nothing was changed") from error
    database.check_versions(manifest, file)
    if check:
        _tell_check(file, manifest, as_json)
        return
    try:
        backup = _Backup(file, key, manifest, msgspec.json.decode(kept, type=list[keys.KeyFile]))
    except msgspec.DecodeError as error:
        raise EngineError(f"{file}: has damaged keys ({error}). Nothing was changed") from error
    moment = _moment(at, manifest, file) if at else None
    if os.environ.get("CLAW_ADMIN_DATABASE_URL"):
        if moment:
            raise EngineError("--at: PostgreSQL of the containers has tools of its own. Nothing was changed")
        where, start, no_start = "the containers", "docker compose up -d", True
        counts, messages = _into_containers(backup, wipe)
    else:
        where, start = str(home_folder()), "./claw up"
        counts, messages = _into_home(Home(home_folder()), backup, wipe, moment, archive)
        if not no_start:
            _claw("up")
    seconds = round(time.monotonic() - began, 1)
    if as_json:
        done = Restored(file, where, moment or manifest.at, counts, messages, seconds, manifest)
        print_json(done)
        return
    state = f"{moment or manifest.at:%Y-%m-%d %H:%M:%S} UTC"
    out.print(f"{where}: the state of {state}, after {seconds} s.", soft_wrap=True)
    out.print(f"{sum(counts.values())} files are restored. The relays send {messages} kept messages again.")
    if no_start:
        out.print(f"No service runs. To start them, so that they answer: {start}")


def _tell_check(file: str, manifest: Manifest, as_json: bool) -> None:
    if as_json:
        print_json(manifest)
        return
    at = f"{manifest.at:%Y-%m-%d %H:%M:%S} UTC"
    out.print(f"{file} is complete: the state of {at}, by version {manifest.code}", soft_wrap=True)
    for part in manifest.parts:
        out.print(f"  {part.name:<24} {part.size / 1e6:10.1f} MB  sha256 {part.sha256}", soft_wrap=True)


def _moment(text: str, manifest: Manifest, file: str) -> datetime:
    """The moment of --at, in UTC."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise EngineError(f"--at: {text!r} must have the form 2026-11-30T14:59:59Z. Nothing was changed") from None
    if moment.tzinfo is None:
        raise EngineError(f"--at: {text!r} must have a time zone, such as Z for UTC. Nothing was changed")
    if not manifest.archive:
        raise EngineError(f"{file}: was made without an archive of WAL: restore it without --at. Nothing was changed")
    if not manifest.at < moment < utcnow():
        raise EngineError(f"--at: must be after {manifest.at.isoformat()}, and not in the future. Nothing was changed")
    return moment.astimezone(UTC)


def _into_home(
    home: Home, backup: _Backup, wipe: bool, at: datetime | None, archive: str
) -> tuple[dict[str, int], int]:
    """Restores into the state folder, and lets PostgreSQL and the object store run. Returns as `_parts`."""
    if not wipe and _has_data(home):
        raise EngineError(
            f"{home.path}: this stack has data. Restore into another CLAW_HOME, or delete the data with --wipe. "
            "Nothing was changed"
        )
    for path in (Path(backup.file).absolute(), key_path()):
        if path.is_relative_to(home.path):
            raise EngineError(f"{path}: move it out of {home.path}, which is made empty first. Nothing was changed")
    _check_room(home.path, backup.manifest, recovers=at is not None)
    with ExitStack() as recovery:
        files = backup.files
        if at:
            try:
                data, files = recovery.enter_context(_recovered(home, backup, at, archive))
            except EngineError as error:
                raise EngineError(f"{error}. Nothing was changed") from error
        _make_empty(home, files, keep_objects=at is not None)
        if at:
            (home.path / "postgres").mkdir(mode=0o700)
            shutil.chown(home.path / "postgres", data.stat().st_uid)
            shutil.move(data, home.path / "postgres" / "data")
    _claw("up", "--only", "postgres,s3", *(["--tls"] if backup.manifest.tls else []))
    done = operator.run(_restore(home, backup, at))
    (home.path / UNFINISHED).unlink()
    return done


@contextmanager
def _recovered(home: Home, backup: _Backup, at: datetime, where: str) -> Iterator[tuple[Path, list[keys.KeyFile]]]:
    """The database at that moment, as a data folder beside the state folder, and the key files until then."""
    secrets = next(json.loads(kept.text) for kept in backup.files if kept.path == "secrets.json")
    to = where or backup.manifest.archive
    own = operator.engines_access().get("s3", {}) if (home.path / "credentials.json").exists() else {}
    archive = Archive(to, secrets["wal"], store_access(own) if to.startswith("s3://") else {})
    live = take.known_archive(home.path)
    if live and live.to == to and Supervisor(home.path).running():
        operator.run(database.archive_now(operator.engines_access()["postgres"]["url"]))
    owner = stack_user(home.path).pw_uid if os.geteuid() == 0 else os.geteuid()
    folder = home.path.with_name(f"{home.path.name}.recovery")
    with Progress() as progress, open_backup(backup.file) as stream, named_store_errors(backup.file):
        parts = BackupReader(stream, backup.key, backup.file).parts()
        base = next(pieces for name, pieces in parts if name == BASE)
        with recovered(folder, _told(base, BASE, progress), archive, at, owner) as data:
            with named_store_errors(to):
                files = key_files(archive, system_of(data), backup.files)
            yield data, files


def _check_room(home: Path, manifest: Manifest, *, recovers: bool) -> None:
    """Raises EngineError if the parts cannot fit on the disk, even without the data that is deleted before. A dump is
    compressed, so a database needs more than its part."""
    unused = take.DATABASE if recovers else BASE
    needed = sum(part.size for part in manifest.parts if part.name != unused)
    place = home
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    # With a moment, the database is recovered before the old data is deleted.
    if needed > free and not recovers:
        for path in home.rglob("*"):
            # A running stack deletes files meanwhile.
            with suppress(FileNotFoundError):
                free += path.lstat().st_blocks * 512
    if needed > free:
        room = f"the backup needs {needed / 1e9:.1f} GB or more, and {free / 1e9:.1f} GB are free"
        raise EngineError(f"{home}: {room}. Nothing was changed")


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


def _make_empty(home: Home, files: list[keys.KeyFile], *, keep_objects: bool) -> None:
    """Deletes everything but the stack's ports, certificates and archive settings. Writes the keys and passwords.

    With `keep_objects`, files that were stored after the backup stay; the heads of audit chains go, because the
    restored chains may not have their records.
    """
    kept = {UNFINISHED, PORTS, ARCHIVE, "tls", *(["s3"] if keep_objects else [])}
    # With --json it does not print that the data stays.
    if home.path.exists() and run_claw("down", "--json", stdout=subprocess.DEVNULL).returncode:
        raise EngineError("./claw down failed; the lines above say why. Nothing was changed")
    make_folder(home.path, "CLAW_HOME")
    keys.restore([keys.KeyFile(UNFINISHED, 0o600, "")], home.path / KEYS_FOLDER, home.path)
    for path in home.path.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(home.path / "s3" / "data" / AUDIT_HEADS, ignore_errors=True)
    keys.restore(files, home.path / KEYS_FOLDER, home.path)


async def _restore(home: Home, backup: _Backup, at: datetime | None) -> tuple[dict[str, int], int]:
    place = home.place()
    found = take.source()
    if at:
        # The data folder has the roles, too.
        return await _parts(found, backup, at)
    # The roles of services that the backup does not know are made at the next start.
    known = [name for name in SERVICES if place.secret.known(f"postgres.{name}.owner")]
    await prepare_roles(found.database_url, {name: Passwords(**passwords(place, name)) for name in known})
    return await _parts(found, backup, None)


def _into_containers(backup: _Backup, wipe: bool) -> tuple[dict[str, int], int]:
    """Restores into the stores that the environment names, after the provisioning. Returns as `_parts`."""
    found = take.source()
    if wipe or operator.run(database.has_tenants(found.database_url)):
        raise EngineError(
            "the database has data, and so have the other volumes: delete them (docker compose down --volumes), start "
            "the provisioning (docker compose up -d provision), and restore without --wipe. Nothing was changed"
        )
    keys.restore(backup.files, found.keys, None)

    async def restored() -> tuple[dict[str, int], int]:
        await database.drop_schemas(found.database_url, SERVICES)
        return await _parts(found, backup, None)

    return operator.run(restored())


async def _parts(found: take.Source, backup: _Backup, at: datetime | None) -> tuple[dict[str, int], int]:
    """Restores all parts but the keys. Returns the objects by bucket, and the number of messages to send again.

    `at`: the database was recovered to this moment already.
    """
    url, store, counts = found.database_url, objects.client(**found.s3), {}
    with Progress() as progress, open_backup(backup.file) as stream, named_store_errors(backup.file):
        reader = BackupReader(stream, backup.key, backup.file)
        for name, pieces in reader.parts():
            told = _told(pieces, name, progress)
            if name == take.DATABASE and not at:
                database.restore(url, told, found.socket)
            elif name.startswith(take.OBJECTS):
                bucket = take.bucket_of(name)
                counts[bucket] = objects.restore(store, bucket, told)
    if reader.manifest != backup.manifest:
        raise EngineError(f"{backup.file}: has changed since it was verified. Restore another backup")
    messages = await database.send_all_again(url)
    async with operator.database(url, "log_aggregator") as chains, chains.begin() as tx:
        audit(tx, operator.actor(), "stack.restore", "backup", backup.file, at=(at or backup.manifest.at).isoformat())
    await _fill_index(url)
    return counts, messages


def _told(pieces: Iterator[bytes], name: str, progress: Progress) -> Iterator[bytes]:
    for piece in pieces:
        progress.add(name, len(piece))
        yield piece


async def _fill_index(url: str) -> None:
    """Lets the memory service fill Milvus, which is not in a backup."""
    async with operator.database(url, "memory") as memory:
        async with memory.begin() as tx:
            model = await active_key(tx)
        await refill(memory, f"milvus/{model}")


def _claw(*arguments: str) -> None:
    """Runs a command that starts or stops processes. Its lines go to stderr."""
    if run_claw(*arguments, stdout=sys.stderr).returncode:
        raise EngineError(f"./claw {' '.join(arguments)} failed; the lines above say why")
