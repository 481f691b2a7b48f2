"""The whole system as `./claw up` starts it, used only through its gateway, as an outside client would."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tooling.testing.model_server import ModelServer, model_server
from tooling.testing.stack import private_home, run_claw
from tooling.testing.system import System


@pytest.fixture(scope="package")
def system() -> Iterator[System]:
    """All engines and services on free ports with their own state, removed afterwards."""
    with private_home() as home:
        run_claw(home, "up")
        yield System.at(home)


@pytest.fixture(scope="module")
async def models() -> AsyncIterator[ModelServer]:
    async with model_server() as server:
        yield server
