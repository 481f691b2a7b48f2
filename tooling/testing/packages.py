"""Debian packages whose files are used without being installed: no root is needed, and no daemon starts."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tooling.stack.engines.base import EngineError


def extract(package: str, folder: Path) -> None:
    """Downloads the package by apt, and extracts its files into the folder.

    Raises EngineError if there is no such package, or no apt.
    """
    download = f"apt-get download {package}"
    # A new machine has no list of packages yet.
    fetch = f"{{ {download} || {{ apt-get update && {download}; }}; }}"
    script = f"{fetch} && dpkg-deb -x {package}_*.deb . && rm {package}_*.deb"
    done = subprocess.run(["sh", "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"cannot take the files of Debian's package {package}: {done.stderr}")
