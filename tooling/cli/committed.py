"""Reads the files that git tracks."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def committed_files(root: Path) -> dict[str, str]:
    """Path → content of every text file that git tracks."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z"], capture_output=True, encoding="utf-8", check=True
    ).stdout
    texts = {}
    for path in filter(None, listed.split("\0")):
        content = (root / path).read_bytes() if (root / path).is_file() else b""
        if b"\0" not in content:
            texts[path] = content.decode("utf-8", errors="replace")
    return texts
