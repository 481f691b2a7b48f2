"""The checkout, and the copy of its code that root's stack runs from if the checkout is closed to other users."""

from __future__ import annotations

import compileall
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import infra

CHECKOUT = Path(infra.__file__).parent.parent
# Everything that the stack imports or reads.
_FOLDERS = ("infra", "protos", "services", "tooling")
# The environments and copies of closed checkouts. Only root can write below it: root runs the Python that lies there.
_COPIES = Path("/usr/local/lib/clawbus")
_NOBODY = 65534


@functools.cache
def is_closed() -> bool:
    """True if root runs this and other users cannot read the checkout, such as a clone below /root (mode 0700).

    The script `claw` applies the same test before it makes the Python environment.
    """
    if os.geteuid() != 0:
        return False
    command = ["test", "-r", str(CHECKOUT / "infra" / "__init__.py")]
    return subprocess.run(command, user=_NOBODY, group=_NOBODY, extra_groups=[], check=False).returncode != 0


def closed_name() -> str:
    """The name under which a closed checkout has its environment, its copy and its state. `claw` makes the same."""
    return f"{CHECKOUT.name}-{hashlib.sha256(str(CHECKOUT).encode()).hexdigest()[:8]}"


def readable_code() -> Path:
    """The folder whose code every user can read: the checkout, or an up-to-date copy of a closed one."""
    if not is_closed():
        return CHECKOUT
    copy = _COPIES / closed_name() / "code"
    copy.mkdir(mode=0o755, parents=True, exist_ok=True)
    with (copy.parent / "copy.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        changed = [_copy(CHECKOUT / name, copy / name) for name in _FOLDERS]
        if any(changed):
            # The stack's user cannot write compiled code here, and nine services would compile it at each start.
            compileall.compile_dir(copy, quiet=2, workers=0)
    return copy


def _copy(source: Path, target: Path) -> bool:
    """Makes `target` equal to `source`, readable by every user. Returns whether anything changed.

    Each file is replaced whole: a service may start from the copy at the same time.
    """
    target.mkdir(mode=0o755, exist_ok=True)
    entries = {entry.name: entry for entry in os.scandir(source) if entry.name != "__pycache__"}
    changed = False
    for old in os.scandir(target):
        if old.name not in entries and old.name != "__pycache__":
            shutil.rmtree(old) if old.is_dir(follow_symlinks=False) else os.unlink(old)
            changed = True
    for name, entry in entries.items():
        if entry.is_dir():
            changed |= _copy(source / name, target / name)
        elif not _is_current(source / name, target / name):
            fresh = target / f".{name}.new"
            shutil.copyfile(source / name, fresh)
            shutil.copystat(source / name, fresh)
            fresh.chmod(0o644)
            fresh.replace(target / name)
            changed = True
    return changed


def _is_current(source: Path, target: Path) -> bool:
    if not target.exists():
        return False
    wanted, found = source.stat(), target.stat()
    return (wanted.st_size, wanted.st_mtime_ns) == (found.st_size, found.st_mtime_ns)


def unreadable() -> Path | None:
    """The first file of the code or of the Python environment that the user of this process cannot read."""
    folders = [CHECKOUT / name for name in _FOLDERS]
    packages = [Path(path) for path in sys.path if Path(path).name == "site-packages"]
    for folder in folders:
        for root, _, files in os.walk(folder):
            for path in [Path(root), *(Path(root, file) for file in files if not file.endswith(".pyc"))]:
                if not os.access(path, os.R_OK):
                    return path
    for path in (Path(sys.executable), *packages, *(entry for folder in packages for entry in folder.iterdir())):
        if not os.access(path, os.R_OK):
            return path
    return None
