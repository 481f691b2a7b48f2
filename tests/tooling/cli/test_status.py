"""Tests of the states that `./claw status` gives to parts that answer, answer late, or do not answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from infra.clock import utcnow
from tooling.cli import status
from tooling.stack.engines import certificates
from tooling.stack.engines.base import Engine, Place, Program, Secrets
from tooling.stack.supervisor import Process, Supervisor

SILENCE_SECONDS = 0.05


class Part:
    """A part of the stack whose answer is given by a test."""

    def __init__(self, *answers: Callable[[], Any]) -> None:
        self.NAME = "part"
        self.PORTS = {"part": 1}
        self._answers = list(answers)

    def install(self) -> None: ...

    def prepare(self, place: Place) -> None: ...

    def program(self, place: Place) -> Program:
        raise NotImplementedError

    async def ready(self, place: Place) -> str:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return str(await answer())

    def access(self, place: Place) -> dict[str, Any]:
        return {}


class Running(Supervisor):
    def processes(self) -> dict[str, Process]:
        return {"part": Process("RUNNING", 0, 3600, 0)}


async def works() -> str:
    return "1.0"


async def fails() -> str:
    raise ConnectionError("refused")


async def is_silent() -> str:
    await asyncio.Event().wait()
    return "never"


async def imports_for_long() -> str:
    """Blocks this process for longer than a part may be silent, and then answers at once."""
    time.sleep(4 * SILENCE_SECONDS)  # noqa: ASYNC251
    for _ in range(10):
        await asyncio.sleep(0)
    return "1.0"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, {"part": 1}, Secrets(tmp_path / "secrets.json"))


@pytest.mark.parametrize(
    ("answers", "state"),
    [
        ([works], "ready"),
        ([fails], "failed"),
        ([is_silent], "failed"),
        ([imports_for_long, fails], "ready"),
        ([fails, works], "ready"),
        ([is_silent, works], "ready"),
    ],
)
async def test_a_part_has_failed_only_if_it_was_silent_twice_while_status_listened(
    answers: list[Callable[[], Any]], state: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "ANSWER_SECONDS", SILENCE_SECONDS)
    monkeypatch.setattr(status, "_TICK_SECONDS", 0.01)
    part: Engine = Part(*answers)
    monkeypatch.setattr(status, "parts", lambda: {"part": part})
    [found] = await status.collect(place, Running(place.home))
    assert found.state == state
    assert found.version == ("1.0" if state == "ready" else None)


async def test_a_certificate_that_ends_soon_is_a_problem(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    part: Engine = Part(works)
    monkeypatch.setattr(status, "parts", lambda: {"part": part})
    certificates.issue(place, ["part"])
    [found] = await status.collect(place, Running(place.home))
    assert found.problem is None
    later = utcnow() + timedelta(days=80)
    monkeypatch.setattr(certificates, "utcnow", lambda: later)
    [found] = await status.collect(place, Running(place.home))
    assert (found.problem or "").startswith("its certificate ends in")
