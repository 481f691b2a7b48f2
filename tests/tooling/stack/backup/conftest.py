"""A backup whose parts are known, in memory."""

from __future__ import annotations

import io
from collections.abc import Mapping
from datetime import UTC, datetime

import pytest

from tooling.stack.backup.parts import FORMAT, BackupWriter, Manifest

KEY = bytes(range(32))
# Longer than a chunk of the sealed stream, so that each part has a chunk of its own.
PARTS = {"objects/a": b"a" * 1_500_000, "keys": b"[]", "database": b"d" * 3_000_000, "objects/b": b""}
AT = datetime(2026, 11, 30, 12, tzinfo=UTC)


def written(contents: Mapping[str, bytes], *, format_: int = FORMAT, **changes: object) -> bytes:
    """A backup with parts of these contents. `changes`: other values of the manifest."""
    file = io.BytesIO()
    writer = BackupWriter(file, KEY)
    for name, content in contents.items():
        writer.begin(name)
        for start in range(0, len(content), 1_000_000):
            writer.write(content[start : start + 1_000_000])
        writer.end()
    values: dict[str, object] = {
        "format": format_,
        "code": "0.1.0",
        "at": AT,
        "finished_at": AT,
        "postgres": "18.6",
        "migrations": {"billing": "0001"},
        "kernel_steps": [],
        "engines": {},
        "objects": {"a": 1},
        "rebuilt": {},
        "parts": writer.parts,
    }
    writer.finish(Manifest(**{**values, **changes}))  # type: ignore[arg-type]
    return file.getvalue()


@pytest.fixture(scope="module")
def backup() -> bytes:
    return written(PARTS)
