"""What every engine of the local stack has in common: where it lives, how it is started, how one knows it works."""

from __future__ import annotations

import base64
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

# How long whoever asks an engine whether it works waits for its answer. On a busy machine the client libraries alone,
# loaded at the first question, take some seconds.
ANSWER_SECONDS = 20


class EngineError(Exception):
    """An engine cannot be set up or started; the text tells a person what is wrong and what to do."""


@dataclass(frozen=True)
class Program:
    """A process to keep running. `environment` is added to the supervisor's own."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_signal: str = "TERM"


class Secrets:
    """The stack's passwords: made at first use, kept in one file that only its owner reads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def __call__(self, name: str) -> str:
        """The password called `name`, letters and digits of any URL."""
        return self._kept(name, lambda: secrets.token_urlsafe(24))

    def bytes32(self, name: str) -> str:
        """The key called `name`: 32 bytes in base64."""
        return self._kept(name, lambda: base64.b64encode(secrets.token_bytes(32)).decode())

    def _kept(self, name: str, make: Callable[[], str]) -> str:
        with self._lock:
            known: dict[str, str] = json.loads(self._path.read_text()) if self._path.exists() else {}
            if name not in known:
                known[name] = make()
                write_atomically(self._path, json.dumps(known, indent=1))
            return known[name]


@dataclass(frozen=True)
class Place:
    """Where one stack lives: its state folder, the port of every listener by name, its passwords, its users.

    `users` get an account of their own in the engines that have accounts.
    """

    home: Path
    ports: Mapping[str, int]
    secret: Secrets
    users: tuple[str, ...] = ()

    def folder(self, engine: str) -> Path:
        """The engine's own folder, made if missing. It is the working directory of its process."""
        path = self.home / engine
        path.mkdir(mode=0o700, exist_ok=True)
        return path


class Engine(Protocol):
    """The face of each module in this package. `PORTS` has the usual port of every listener, the main one first."""

    NAME: str
    PORTS: dict[str, int]

    def install(self) -> None:
        """Gets what is not in the Python packages. Raises EngineError with the command that a person can run."""

    def prepare(self, place: Place) -> None:
        """Makes data folder and configuration. What it cannot finish it makes again the next time."""

    def program(self, place: Place) -> Program:
        """How to start it."""

    async def ready(self, place: Place) -> str:
        """Makes one real round trip as a client does and returns the server's version; raises while it cannot.

        It imports its client itself: all clients together take seconds that a command without engines has no use for.
        """

    def access(self, place: Place) -> dict[str, Any]:
        """What an administrator's client needs, as in credentials.json."""


def cache_path() -> Path:
    """The folder of the downloaded and unpacked programs, which all stacks of one user share."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clawbus"


def cache_folder() -> Path:
    """The same folder, made if it is missing."""
    path = cache_path()
    path.mkdir(parents=True, exist_ok=True)
    return path


def package_folder(name: str) -> Path:
    """Where a Python package lies, without importing it: its code may be slow to import, or complain."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise EngineError(f"the Python package {name} is missing: there is none for this kind of machine")
    return Path(spec.origin).parent


def write_atomically(path: Path, text: str, mode: int = 0o600) -> None:
    """Writes the file whole or not at all: a process killed in the middle leaves the old one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def fresh_folder(data: Path) -> Path:
    """An empty folder beside `data`, to be filled and renamed: what is killed in between is never taken for data.

    Each time another one: a program of a killed `up` may still write to the last. Those are removed.
    """
    for old in data.parent.glob(f"{data.name}.new.*"):
        shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{data.name}.new.", dir=data.parent))


def sha256(text: str) -> str:
    """Hexadecimal digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
