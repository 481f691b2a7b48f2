"""The key of the backups: a file of its own, which is in no backup."""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
from pathlib import Path

from infra.security.crypto import KEY_BYTES, read_key
from tooling.stack.engines.base import EngineError, make_folder, write_atomically

_TEXT = """\
# The key of the backups of Clawbus. Without this file no backup can be read.
# Keep a copy on another machine, and not beside the backups.
"""


def key_path() -> Path:
    """CLAW_BACKUP_KEY_FILE, or ``clawbus/backup.key`` in the user's configuration folder."""
    if named := os.environ.get("CLAW_BACKUP_KEY_FILE"):
        return Path(named).absolute()
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "clawbus" / "backup.key"


def backup_key() -> bytes:
    """The key for a new backup. Makes the file if it is missing."""
    path = key_path()
    if not path.exists():
        make_folder(path.parent, "CLAW_BACKUP_KEY_FILE")
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        write_atomically(new, f"{_TEXT}{base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()}\n")
        # Of two first backups at the same time, one makes the key and the other uses it.
        with contextlib.suppress(FileExistsError):
            os.link(new, path)
        new.unlink()
    return known_key()


def known_key() -> bytes:
    """The key in the file. Raises EngineError if the file is missing or is not a key."""
    path = key_path()
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise EngineError(
            f"{path}: the key of the backups is missing. Copy it there, or name its file in CLAW_BACKUP_KEY_FILE"
        ) from None
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError:
        lines = []
    try:
        return read_key("".join(line.strip() for line in lines if not line.startswith("#")))
    except ValueError as error:
        raise EngineError(f"{path}: the key of the backups {error}") from None
