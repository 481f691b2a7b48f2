"""``./claw backup``: one sealed file with everything that a stack needs to begin again on another machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, Annotated, Any, cast

import msgspec
import typer
from rich.console import Console

from infra.clock import utcnow
from infra.security.audit import audit
from tooling.cli.output import Json, Progress, print_json
from tooling.stack import operator
from tooling.stack.backup import take, wal
from tooling.stack.backup.keyfile import backup_key, key_path
from tooling.stack.backup.parts import BackupWriter, Manifest
from tooling.stack.backup.targets import Target, file_name, made_at, named_store_errors, target
from tooling.stack.checkout import CHECKOUT
from tooling.stack.engines.base import EngineError
from tooling.stack.home import home_folder

out = Console(highlight=False)
_KEPT_FREE_BYTES = 10**9
"""The space that a backup leaves in its folder: the databases of the stack may be on the same disk."""


class Taken(msgspec.Struct, frozen=True):
    """A new backup, as `backup --json` prints it."""

    file: str
    """Path or URL."""
    size: int
    """Bytes."""
    sha256: str
    """Of the whole file."""
    key_file: str
    seconds: float
    removed: list[str]
    """Older backups that were removed."""
    manifest: Manifest


def backup(
    to: Annotated[
        str, typer.Option(help="A folder, or s3://bucket/prefix. Default: a folder beside the state folder.")
    ] = "",
    keep_days: Annotated[
        int, typer.Option(min=0, help="Then remove backups there that are older than this. 0: remove none.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Write an encrypted backup of the running stack into one file. Its key is in a separate file."""
    began = time.monotonic()
    # As Ctrl+C does, so that the unfinished file is removed: a timer may stop this command.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    found = take.source()
    key = backup_key()
    place = target(to or f"{home_folder()}-backups", found.s3)
    name = file_name(utcnow())
    where = place.where(name)
    with named_store_errors(where):
        with Progress() as progress, _written(where), place.new(name) as file:
            counted = _Counted(file, where)
            manifest = operator.run(_take(found, BackupWriter(cast(IO[bytes], counted), key), where, progress))
        removed = _expire(place, name, keep_days) if keep_days else []
        if keep_days and found.home and found.archive:
            system = wal.system_of(found.home / "postgres" / "data")
            wal.prune(found.archive, system, utcnow() - timedelta(days=keep_days))
    seconds = round(time.monotonic() - began, 1)
    taken = Taken(where, counted.size, counted.digest.hexdigest(), str(key_path()), seconds, removed, manifest)
    if as_json:
        print_json(taken)
        return
    count = sum(manifest.objects.values())
    size, at = f"{counted.size / 1e6:.1f} MB", f"{manifest.at:%Y-%m-%d %H:%M:%S} UTC"
    out.print(f"{where}: {size}, the state of {at}, {count} files", soft_wrap=True)
    out.print(f"The key is in {key_path()}, and not in the backup. Keep a copy on another machine.", soft_wrap=True)
    if removed:
        out.print(f"Removed {len(removed)} older backups.")


async def _take(found: take.Source, writer: BackupWriter, where: str, progress: Progress) -> Manifest:
    async with operator.database(found.database_url, "log_aggregator") as database, database.begin() as tx:
        audit(tx, operator.actor(), "stack.backup", "backup", where)
    engines = {}
    if found.home:
        parts = json.loads(run_claw("status", "--json", stdout=subprocess.PIPE).stdout or "[]")
        engines = {part["name"]: part["version"] for part in parts if part["kind"] == "engine"}
    return await take.take(found, writer, engines, progress.add)


def _expire(place: Target, newest: str, keep_days: int) -> list[str]:
    """Removes the older backups, after a new one is complete. Returns their names."""
    limit = utcnow() - timedelta(days=keep_days)
    old = [name for name in place.stored() if name != newest and (at := made_at(name)) and at < limit]
    for name in sorted(old):
        place.remove(name)
    return sorted(old)


@contextmanager
def _written(where: str) -> Iterator[None]:
    """Turns the errors of a folder's disk into an EngineError that names the file."""
    try:
        yield
    except OSError as error:
        raise EngineError(f"{where}: cannot be written ({error.strerror})") from error


class _Counted:
    """A file that counts and digests the bytes that are written to it. Errors name `where`."""

    def __init__(self, file: IO[bytes], where: str) -> None:
        self._file = file
        self._where = where
        self._folder = None if where.startswith("s3://") else Path(where).parent
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, content: bytes) -> None:
        # Here, because it would pass for an error of the database above.
        with _written(self._where):
            if self._folder and shutil.disk_usage(self._folder).free < _KEPT_FREE_BYTES + len(content):
                raise EngineError(
                    f"{self._where}: would leave less than 1 GB of the disk free. Nothing was kept: free some space, "
                    "or give another place with --to"
                )
            self._file.write(content)
        self.size += len(content)
        self.digest.update(content)


def run_claw(*arguments: str, stdout: Any) -> subprocess.CompletedProcess[str]:
    """Runs another command of `./claw`. Root's becomes the stack's user; this one stays root, to reach the backups."""
    command = [sys.executable, "-m", "tooling.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    return subprocess.run(command, env=environment, stdout=stdout, text=True, check=False)
