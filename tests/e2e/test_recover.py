"""The bench ``recover`` on the running system: each killed service comes back, and its message is answered."""

from __future__ import annotations

import pytest

from tooling.bench.recover import GOALS, on_system
from tooling.testing.model_server import ModelServer
from tooling.testing.stack import Stack
from tooling.testing.system import System


@pytest.mark.timeout(900)
async def test_each_service_recovers_from_sigkill(system: System, models: ModelServer) -> None:
    before = Stack(system.home).pids()
    async with on_system(system, models) as bench:
        figures = await bench.measure(lambda *_: None, 1)
    assert [figure.goal for figure in figures] == list(GOALS.values())
    assert all(figure.value > 0 for figure in figures)
    after = Stack(system.home).pids()
    assert {name for name in GOALS if before[name] == after[name]} == set()
