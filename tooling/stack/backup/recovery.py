"""Recovers the data folder of a database to one moment, from a backup's part `BASE` and the archived WAL.

It happens beside the stack, so a segment that is missing or damaged is found before the stack is changed.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import msgspec

from tooling.stack.backup import wal
from tooling.stack.backup.database import feed
from tooling.stack.backup.wal import Archive
from tooling.stack.checkout import readable_code
from tooling.stack.engines import postgres
from tooling.stack.engines.base import EngineError, write_atomically

_DATA, _LOG = "data", "postgres.log"
_TICK_SECONDS = 0.2


@contextmanager
def recovered(folder: Path, pieces: Iterable[bytes], archive: Archive, at: datetime, owner: int) -> Iterator[Path]:
    """The data folder with all transactions that were committed until `at`, for the block; the server is stopped.

    folder: is made for it, and deleted with everything in it afterwards. owner: the user who runs the database; only
    root may name another one.
    Raises EngineError if the base is of another PostgreSQL, if WAL is missing, damaged or of another database, or if
    the archive does not reach `at`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        os.chown(folder, owner, -1)
        data = folder / _DATA
        _unpack(pieces, data, owner)
        if (found := (data / "PG_VERSION").read_text().strip()) != postgres.MAJOR:
            raise EngineError(f"the base is of PostgreSQL {found}, and this is PostgreSQL {postgres.MAJOR}")
        _replay(folder, archive, at, owner)
        yield data
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unpack(pieces: Iterable[bytes], data: Path, owner: int) -> None:
    data.mkdir(mode=0o700)
    os.chown(data, owner, -1)
    command = ["tar", "--extract", "--no-same-owner", f"--directory={data}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, **_as(owner)) as process:
        feed(process, pieces)
    if process.returncode:
        raise EngineError(f"{data}: tar could not unpack the base; is the disk full?")


def _replay(folder: Path, archive: Archive, at: datetime, owner: int) -> None:
    """Starts a server that reads the WAL until `at`, waits until it has, and stops it."""
    access = folder / postgres.ARCHIVE
    write_atomically(access, msgspec.json.encode(archive).decode())
    os.chown(access, owner, -1)
    data = folder / _DATA
    (data / "recovery.signal").touch()
    os.chown(data / "recovery.signal", owner, -1)
    settings = {
        **postgres.SETTINGS,
        "listen_addresses": "",
        "unix_socket_directories": str(folder),
        "hot_standby": "off",
        "restore_command": postgres.wal_command("pull", access, folder, "%f", "%p"),
        "recovery_target_time": at.isoformat(),
        "recovery_target_action": "promote",
        # With archiving, and no command: the history of the new timeline waits, until the restored stack archives it.
        "archive_mode": "on",
        "archive_command": "",
    }
    environment = {**os.environ, "PYTHONPATH": str(readable_code())}
    command = postgres.server_command(data, settings)
    with (
        (folder / _LOG).open("w+b") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment, **_as(owner)) as process,
    ):
        try:
            while not _answers(folder):
                if process.poll() is not None:
                    raise _refusal(folder, archive, wal.system_of(data), at, log)
                time.sleep(_TICK_SECONDS)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def _answers(folder: Path) -> bool:
    """True after the recovery: until then the server refuses connections."""
    command = [str(postgres.BIN / "pg_isready"), "--quiet", f"--host={folder}"]
    return subprocess.run(command, check=False).returncode == 0


def _refusal(folder: Path, archive: Archive, system: int, at: datetime, log: IO[bytes]) -> EngineError:
    """The reason for which the server has ended."""
    if (file := folder / wal.REFUSAL).exists():
        return EngineError(file.read_text())
    log.seek(0)
    text = log.read().decode(errors="replace")
    missing = folder / wal.MISSING
    if "before configured recovery target" in text and missing.exists():
        name = missing.read_text()
        if any(other > name for other in wal.segments(archive, system)):
            return EngineError(f"{archive.to}: the segment {name} of the WAL is missing, and later ones are there")
        return EngineError(
            f"{archive.to}: the archive ends before the segment {name}, and does not reach {at.isoformat()}"
        )
    tail = "\n".join(text.splitlines()[-8:])
    return EngineError(f"PostgreSQL could not recover to {at.isoformat()}. Its log ends with:\n{tail}")


def _as(owner: int) -> dict[str, Any]:
    """PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return {}
    return {"user": owner, "group": pwd.getpwuid(owner).pw_gid, "extra_groups": []}
