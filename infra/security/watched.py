"""A file whose content is read again when the file is replaced: keys change while a process runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from infra.errors import describe
from infra.observe.logs import get_logger

T = TypeVar("T")

LOOK_SECONDS = 1.0
"""A change is noticed within this time."""


class Watched(Generic[T]):
    """The content of a file. `read` raises ValueError if the file is not usable; so does the constructor."""

    def __init__(self, path: Path, read: Callable[[Path], T]) -> None:
        self.path = path
        self._read = read
        self._stamp = self._stamped()
        self._looked = time.monotonic()
        self.content = read(path)
        self.version = 0
        """Grows with each change."""

    def look(self, *, now: bool = False) -> None:
        """Reads the file again if it was replaced. Looks once a second, unless `now`."""
        if not now and time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        try:
            if (stamp := self._stamped()) == self._stamp:
                return
            self._stamp = stamp
            self.content = self._read(self.path)
            self.version += 1
        except (OSError, ValueError) as error:
            get_logger("infra.security").error(
                "could not read a key file; the keys that were read before stay in use", error=describe(error)
            )

    def _stamped(self) -> tuple[int, int, int]:
        found = os.stat(self.path)
        return found.st_mtime_ns, found.st_ino, found.st_size
