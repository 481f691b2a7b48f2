"""Python environments beside the project's own: for packages that it does not need, or that would lower its pins."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE, STDOUT
from hashlib import sha256
from pathlib import Path

from tooling.stack.checkout import CHECKOUT
from tooling.stack.engines.base import EngineError


async def environment(name: str) -> Path:
    """Path of the Python of ``.venv-<name>``, with the packages of ``requirements-<name>.txt``.

    Makes the environment if it is missing or its pins have changed, and says so on stderr.

    Raises EngineError if the packages cannot be installed.
    """
    pins, folder = CHECKOUT / f"requirements-{name}.txt", CHECKOUT / f".venv-{name}"
    if python_with_pins(name) is None:
        _say(f"installing {pins.name} into {folder.name} (about 30 MB to download)")
        await _run(sys.executable, "-m", "venv", "--clear", folder)
        pip = ("-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off")
        await _run(folder / "bin" / "python", *pip, "--require-hashes", "--requirement", pins)
        (folder / "installed").write_text(_digest(pins))
    return folder / "bin" / "python"


def python_with_pins(name: str) -> Path | None:
    """The Python of the environment, if it has the packages of its pins."""
    folder = CHECKOUT / f".venv-{name}"
    done = folder / "installed"
    is_current = done.exists() and done.read_text() == _digest(CHECKOUT / f"requirements-{name}.txt")
    return folder / "bin" / "python" if is_current else None


def _digest(pins: Path) -> str:
    return sha256(pins.read_bytes()).hexdigest()


async def _run(*command: str | Path) -> None:
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=STDOUT)
    assert process.stdout is not None
    lines = []
    async for line in process.stdout:
        lines.append(line.decode())
        if lines[-1].startswith("Collecting") and sum(line.startswith("Collecting") for line in lines) % 20 == 0:
            _say("  20 more packages collected")
    if await process.wait():
        raise EngineError(f"could not install the packages:\n{''.join(lines[-20:])}")


def _say(text: str) -> None:
    print(f"claw: {text}", file=sys.stderr)  # noqa: T201
