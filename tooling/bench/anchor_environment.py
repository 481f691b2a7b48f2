"""A Python environment for anchors whose packages the project itself does not need (.venv-bench)."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE, STDOUT
from hashlib import sha256
from pathlib import Path

from tooling.stack.checkout import CHECKOUT
from tooling.stack.engines.base import EngineError

PINS = CHECKOUT / "requirements-bench.txt"
FOLDER = CHECKOUT / ".venv-bench"


async def environment() -> Path:
    """Path of its Python. Makes the environment if it is missing or its pins have changed, and says so on stderr.

    Raises EngineError if the packages cannot be installed.
    """
    python, done = FOLDER / "bin" / "python", FOLDER / "installed"
    pins = sha256(PINS.read_bytes()).hexdigest()
    if not done.exists() or done.read_text() != pins:
        _say(f"installing {PINS.name} into {FOLDER.name}, for the anchors only (about 30 MB to download)")
        await _run(sys.executable, "-m", "venv", "--clear", FOLDER)
        pip = ("-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off")
        await _run(python, *pip, "--require-hashes", "--requirement", PINS)
        done.write_text(pins)
    return python


async def _run(*command: str | Path) -> None:
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=STDOUT)
    assert process.stdout is not None
    lines = []
    async for line in process.stdout:
        lines.append(line.decode())
        if lines[-1].startswith("Collecting") and sum(line.startswith("Collecting") for line in lines) % 20 == 0:
            _say("  20 more packages collected")
    if await process.wait():
        raise EngineError(f"could not install the packages of {PINS.name}:\n{''.join(lines[-20:])}")


def _say(text: str) -> None:
    print(f"claw: {text}", file=sys.stderr)  # noqa: T201
