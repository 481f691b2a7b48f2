"""The protocol of the engines of the local stack, and the folders, passwords and programs that they share."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

# The time that a client waits for an engine's answer. On a busy machine the import of the client alone takes seconds.
ANSWER_SECONDS = 20


class EngineError(Exception):
    """A command cannot do its work. The text names the problem and the action for the person to take."""


@dataclass(frozen=True)
class Program:
    """A process to keep running."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of the supervisor."""
    stop_signal: str = "TERM"


class Secrets:
    """The stack's passwords. Each is made at its first use; all are in one file that only its owner can read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def __call__(self, name: str) -> str:
        """The password called `name`. It needs no escaping in a URL."""
        return self._kept(name, lambda: secrets.token_urlsafe(24))

    def known(self, name: str) -> str:
        """The password called `name`; empty if it was never made."""
        return str(self._read().get(name, ""))

    def _kept(self, name: str, make: Callable[[], str]) -> str:
        with self._lock:
            known = self._read()
            if name not in known:
                known[name] = make()
                write_atomically(self._path, json.dumps(known, indent=1))
            return known[name]

    def _read(self) -> dict[str, str]:
        known: dict[str, str] = json.loads(self._path.read_text()) if self._path.exists() else {}
        return known


@dataclass(frozen=True)
class Place:
    """The state folder, ports, passwords and users of one stack."""

    home: Path
    ports: Mapping[str, int]
    """The port of every listener, by the listener's name."""
    secret: Secrets
    users: tuple[str, ...] = ()
    """Each gets its own account in the engines that have accounts."""

    def folder(self, engine: str) -> Path:
        """The engine's own folder, made if it is missing. It is the working directory of the engine's process."""
        path = self.home / engine
        path.mkdir(mode=0o700, exist_ok=True)
        return path


class Engine(Protocol):
    """The interface of each module in this package."""

    NAME: str
    PORTS: dict[str, int]
    """The usual port of every listener, the main listener first."""

    def install(self) -> None:
        """Gets the programs that are not in Python packages. Raises EngineError with the command to run instead."""

    def prepare(self, place: Place) -> None:
        """Makes the data folder and the configuration. If it is interrupted, the next call starts over."""

    def program(self, place: Place) -> Program:
        """The process to start."""

    async def ready(self, place: Place) -> str:
        """Makes one round trip as a client, and returns the server's version. Raises if the engine does not work.

        Each engine imports its client here: the imports of all clients take seconds, which other commands do not need.
        """

    def access(self, place: Place) -> dict[str, Any]:
        """The administrator's access, as in credentials.json."""


def cache_path() -> Path:
    """The folder of the downloaded and unpacked programs, which all stacks of one user share."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clawbus"


def cache_folder() -> Path:
    """The same folder, made if it is missing."""
    path = cache_path()
    make_folder(path, "XDG_CACHE_HOME", mode=0o777)
    return path


def make_folder(path: Path, variable: str, mode: int = 0o700) -> None:
    """Makes the folder if it is missing. Raises EngineError that names the variable which chose it."""
    try:
        path.mkdir(mode, parents=True, exist_ok=True)
    except OSError as error:
        raise EngineError(f"{variable}: the folder {path} cannot be made ({error.strerror})") from error


def package_folder(name: str) -> Path:
    """The folder of a Python package. Does not import it: an import may be slow or print warnings."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise EngineError(f"the Python package {name} is missing: it does not exist for this kind of machine")
    return Path(spec.origin).parent


def write_atomically(path: Path, text: str | bytes, mode: int = 0o600) -> None:
    """Writes the file whole or not at all: if the process is killed in the middle, the old file stays.

    The file belongs to the owner of its folder: root may write it, and the stack's user must be able to read it.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        if os.geteuid() == 0:
            owner = path.parent.stat()
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
        file.write(text.encode() if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def fresh_folder(data: Path) -> Path:
    """An empty folder beside `data`. The caller fills it and renames it to `data`, so that `data` is always complete.

    Each call makes a folder with a new name, because a program of a killed `up` may still write to the last one.
    Removes the old ones.
    """
    for old in data.parent.glob(f"{data.name}.new.*"):
        shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{data.name}.new.", dir=data.parent))


def complete(fresh: Path, folder: Path) -> None:
    """Renames a folder that is complete. After a power cut it is there as a whole, or not at all.

    If another process has made the same folder meanwhile, that one stays.
    """
    for path in (*fresh.rglob("*"), fresh):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    try:
        fresh.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def sha256(text: str) -> str:
    """The SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
