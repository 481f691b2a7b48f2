"""A disk of its own for a folder: a file system in a file, whose power can be cut.

A cut is the ioctl by which ext4's own tests stop a file system: from then on nothing more is written, neither data that
was not synced nor the journal. A new mount then shows the content that a real disk would have after its power came
back. Needs root.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

# EXT4_IOC_SHUTDOWN of the kernel's fs/ext4/ext4.h, and its flag to drop the journal that is not on the disk yet.
_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = 2


class Disk:
    """An ext4 file system, mounted on a folder."""

    def __init__(self, image: Path, folder: Path) -> None:
        self._image = image
        self.folder = folder

    def mount(self) -> None:
        _run("mount", "-o", "loop", str(self._image), str(self.folder))

    def unmount(self) -> None:
        _run("umount", str(self.folder))

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """A file takes all free space for the block."""
        filler = self.folder / "filler"
        with filler.open("wb") as file:
            while free := os.statvfs(self.folder).f_bavail:
                # Less than the free space: the file system takes blocks for itself, too.
                file.write(bytes(os.statvfs(self.folder).f_frsize * max(1, min(free // 2, 256))))
                file.flush()
        try:
            yield
        finally:
            filler.unlink()

    def cut_power(self) -> None:
        """Nothing reaches the disk any more; each call that writes or syncs fails."""
        opened = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(opened, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(opened)


@contextlib.contextmanager
def disk(image: Path, folder: Path, megabytes: int) -> Iterator[Disk]:
    """A new disk with the content of the folder. The image takes only the space that is written."""
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    # Without blocks that only root may use.
    _run("mkfs.ext4", "-q", "-m", "0", "-d", str(folder), str(image))
    made = Disk(image, folder)
    made.mount()
    try:
        yield made
    finally:
        made.unmount()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
