"""The files of keys and passwords as a part of a backup: the stack needs them to read its own data."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

import msgspec

from tooling.stack.engines.base import write_atomically
from tooling.stack.keys import master_file

# In the state folder: the passwords of the engines, and the access of `./claw chat`.
_OF_HOME = ("secrets.json", "demo.json")
_KEYS = "keys"
_PATH = re.compile(r"(keys/)?[A-Za-z0-9_.-]+|keys(/[A-Za-z0-9_.-]+)+")
_MASTER = master_file(Path(), "").name


class KeyFile(msgspec.Struct, frozen=True):
    """A file by its path: ``keys/…`` in the folder of keys, any other name in the state folder."""

    path: str
    mode: int
    text: str

    def __post_init__(self) -> None:
        # A backup of a stranger, sealed under a key that they gave, must not write elsewhere: root may restore it.
        if not _PATH.fullmatch(self.path) or ".." in self.path.split("/") or not 0 <= self.mode <= 0o777:
            raise ValueError(f"the file {self.path!r} with mode {self.mode:o} is not one of the keys")


def read(folder: Path, home: Path | None) -> list[KeyFile]:
    """All files in the folder of keys, and those of the state folder if there is one."""
    # A file that is being replaced has another one beside it for a moment.
    found = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"]
    paths = {f"{_KEYS}/{path.relative_to(folder)}": path for path in found}
    if home:
        paths |= {name: home / name for name in _OF_HOME if (home / name).exists()}
    return [KeyFile(name, path.stat().st_mode & 0o777, path.read_text()) for name, path in sorted(paths.items())]


def merge(before: list[KeyFile], after: list[KeyFile]) -> list[KeyFile]:
    """The files after a snapshot, and in them the master keys from before it.

    A rotation of the master keys may begin or end between the two. Then the snapshot has values under both keys.
    """
    known = {file.path: file.text for file in before}

    def merged(file: KeyFile) -> KeyFile:
        if PurePosixPath(file.path).name != _MASTER:
            return file
        lines = dict.fromkeys([*file.text.split(), *known.get(file.path, "").split()])
        return msgspec.structs.replace(file, text="\n".join(lines))

    return [merged(file) for file in after]


def restore(files: list[KeyFile], folder: Path, home: Path | None) -> None:
    """Writes the files into the folder of keys and the state folder; without `home`, only the keys.

    They belong to the owner of the state folder: root may run this.
    """
    owner = (home or folder).stat()
    for file in files:
        top, _, rest = file.path.partition("/")
        if top == _KEYS:
            path = folder / rest
        elif home:
            path = home / file.path
        else:
            continue
        missing = [parent for parent in path.parents if not parent.exists()]
        for parent in reversed(missing):
            parent.mkdir(mode=0o700)
            os.chown(parent, owner.st_uid, owner.st_gid)
        write_atomically(path, file.text, file.mode)
