"""Debian packages whose files are used without being installed: no root is needed, and no daemon starts."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tooling.stack.engines.base import EngineError


def extract(package: str, folder: Path) -> None:
    """Downloads the package by apt, and extracts its files into the folder.

    Raises EngineError if there is no such package, or no apt.
    """
    for command in (
        ("apt-get", "download", package),
        ("sh", "-c", f"dpkg-deb -x {package}_*.deb . && rm {package}_*.deb"),
    ):
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        except OSError as error:
            raise EngineError(f"cannot take the files of Debian's package {package}: {error}") from error
        except subprocess.CalledProcessError as error:
            raise EngineError(f"cannot take the files of Debian's package {package}: {error.stderr}") from error
