"""Recovers the data folder of a database to one moment, from a backup's part `BASE` and the archived WAL.

It happens beside the stack, so a segment that is missing or damaged is found before the stack is changed.
"""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from infra.errors import describe
from tooling.stack.backup import wal
from tooling.stack.backup.database import feed
from tooling.stack.backup.targets import named_store_errors
from tooling.stack.backup.wal import Archive
from tooling.stack.engines import postgres
from tooling.stack.engines.base import EngineError

_DATA, _LOG = "data", "postgres.log"
_TICK_SECONDS = 0.2
# PostgreSQL takes 1 for "there is no such file", and stops the recovery if the code is over 125.
_DAMAGED = 200


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
    data = folder / _DATA
    with named_store_errors(archive.to):
        timeline = wal.timeline(archive, wal.system_of(data), at)
    supply = _Supply(folder, archive, owner)
    (data / "recovery.signal").touch()
    os.chown(data / "recovery.signal", owner, -1)
    settings = {
        **postgres.SETTINGS,
        "listen_addresses": "",
        "unix_socket_directories": str(folder),
        "hot_standby": "off",
        "restore_command": supply.command,
        "recovery_target_time": at.isoformat(),
        "recovery_target_timeline": timeline,
        "recovery_target_action": "promote",
        # With archiving, and no command: the history of the new timeline waits, until the restored stack archives it.
        "archive_mode": "on",
        "archive_command": "",
    }
    command = postgres.server_command(data, settings)
    with (
        supply.served(),
        (folder / _LOG).open("w+b") as log,
        subprocess.Popen(command, stdout=log, stderr=log, **_as(owner)) as process,
    ):
        try:
            while not _answers(folder):
                if process.poll() is not None:
                    raise supply.refused or _refusal(supply, archive, wal.system_of(data), at, log)
                time.sleep(_TICK_SECONDS)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


class _Supply:
    """Gives the server each file of the WAL that it asks for, out of the archive.

    It works in this process, and the server's command only asks for the file and waits: a Python program for each file
    would take half a second to start, and a recovery may need thousands of files.
    """

    def __init__(self, folder: Path, archive: Archive, owner: int) -> None:
        self._data = folder / _DATA
        self._archive = archive
        self._owner = owner
        self.refused: EngineError | None = None
        """The error of a file that is damaged."""
        self.missing = ""
        """The last segment that the server has asked for and that is not in the archive."""
        asked, answer = folder / "asked", folder / "answer"
        for path in (asked, answer):
            os.mkfifo(path, 0o600)
            os.chown(path, owner, -1)
        # For reading and writing: neither end then waits for the other one to open the pipe.
        self._asked, self._answer = os.open(asked, os.O_RDWR), os.open(answer, os.O_RDWR)
        command = f"echo %f %p >{shlex.quote(str(asked))} && read code <{shlex.quote(str(answer))} && exit $code"
        self.command = command

    @contextmanager
    def served(self) -> Iterator[None]:
        """Answers the server until the end of the block."""
        thread = threading.Thread(target=self._serve)
        thread.start()
        try:
            yield
        finally:
            os.write(self._asked, b"\n")
            thread.join()
            os.close(self._asked)
            os.close(self._answer)

    def _serve(self) -> None:
        with open(self._asked, "rb", closefd=False) as asked:
            while line := asked.readline().split():
                name, path = (part.decode() for part in line)
                os.write(self._answer, b"%d\n" % self._pull(name, self._data / path))

    def _pull(self, name: str, path: Path) -> int:
        """Writes the file to the path. Returns the exit code of the server's command."""
        try:
            with named_store_errors(self._archive.to):
                content = wal.pull(self._archive, wal.system_of(self._data), name)
        except Exception as error:
            # Any error: without an answer the server would wait forever.
            self.refused = error if isinstance(error, EngineError) else EngineError(describe(error))
            return _DAMAGED
        if content is None:
            if wal.is_segment(name):
                self.missing = name
            return 1
        path.touch(0o600)
        os.chown(path, self._owner, -1)
        path.write_bytes(content)
        return 0


def _answers(folder: Path) -> bool:
    """True after the recovery: until then the server refuses connections."""
    command = [str(postgres.BIN / "pg_isready"), "--quiet", f"--host={folder}"]
    return subprocess.run(command, check=False).returncode == 0


def _refusal(supply: _Supply, archive: Archive, system: int, at: datetime, log: IO[bytes]) -> EngineError:
    """The reason for which the server has ended."""
    log.seek(0)
    text = log.read().decode(errors="replace")
    if "before configured recovery target" in text and (name := supply.missing):
        # Of the same timeline, the first eight digits: another one has segments of its own.
        if any(other > name and other[:8] == name[:8] for other in wal.segments(archive, system)):
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
