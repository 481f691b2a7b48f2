"""A campaign whose clients fail has a verdict too: hours of load are not thrown away."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from tests.tooling.testing.campaign.made_up import good
from tooling.testing.campaign import campaign, faults
from tooling.testing.campaign.campaign import Campaign
from tooling.testing.campaign.evidence import Evidence


class MadeUpLoad:
    """Its clients are answered in a way that no vendor expects, or are never answered."""

    def __init__(self, *_: object, fails: bool) -> None:
        self.stopping = asyncio.Event()
        self.kept_answers = None
        self.attempts, self.failed = 0, ["503"]
        self._fails = fails

    @asynccontextmanager
    async def prepared(self) -> Any:
        yield

    async def run(self) -> None:
        if self._fails:
            raise AssertionError("HTTP 418")
        await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("fails", "problem"),
    [
        (True, "the campaign: AssertionError: HTTP 418"),
        (False, "a message was not acknowledged within 0 s after the last fault"),
    ],
)
async def test_its_clients_fail_or_are_never_answered(
    monkeypatch: pytest.MonkeyPatch, fails: bool, problem: str
) -> None:
    class MadeUpCollector:
        def __init__(self, *arguments: Any) -> None:
            self._problems = arguments[-1]

        async def evidence(self) -> Evidence:
            evidence = good()
            evidence.problems = self._problems
            return evidence

    async def injected(*_: object) -> None:
        await asyncio.sleep(3600 if fails else 0)

    monkeypatch.setattr(campaign, "STALL_SECONDS", 0.0)
    monkeypatch.setattr(campaign, "Load", lambda *_, **__: MadeUpLoad(fails=fails))
    monkeypatch.setattr(campaign, "Collector", MadeUpCollector)
    monkeypatch.setattr(faults.Injector, "run", injected)
    # The system does not become ready either.
    monkeypatch.setattr(Campaign, "_healthy", lambda self: asyncio.sleep(0, result=False))
    monkeypatch.setattr(Campaign, "_at_rest", lambda self: asyncio.sleep(0))
    rig: Any = SimpleNamespace(stack=None)
    system: Any = None
    models: Any = None
    report = await Campaign(system, models, 7, ["kill"], rig=rig).run(1, lambda _: None)
    [accepted] = [verdict for verdict in report.invariants if not verdict.held]
    assert [one.what for one in accepted.violations] == [
        problem,
        "the system was not ready within 0 s after the last fault",
    ]
