"""The whole system as `./claw up` starts it, used only through its gateway, as an outside client would."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tooling.stack.home import SERVICES
from tooling.testing.model_server import ModelServer, model_server
from tooling.testing.stack import private_home, run_claw
from tooling.testing.system import System


@pytest.fixture(scope="package")
def system() -> Iterator[System]:
    """All engines and services on free ports with their own state, removed afterwards."""
    with private_home() as home:
        run_claw(home, "up")
        yield System.at(home)
        _down_ends_the_services_before_the_engines(home)


def _down_ends_the_services_before_the_engines(home: Path) -> None:
    """Tested here: a test would have to start the whole system again for the others."""
    log = home / "log" / "supervisord.log"
    before = log.stat().st_size
    run_claw(home, "down")
    stopped = re.findall(r"(?:stopped|exited): (\w+) \((.*?)[;)]", log.read_text()[before:])
    assert [what for what in stopped if what[0] in SERVICES] == stopped[: len(SERVICES)]
    assert {how for _, how in stopped[: len(SERVICES)]} == {"exit status 0"}


@pytest.fixture(scope="module")
async def models() -> AsyncIterator[ModelServer]:
    async with model_server() as server:
        yield server
