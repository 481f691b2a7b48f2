"""A short campaign of faults on the running system; `./claw prove` runs a longer one on a system of its own."""

from __future__ import annotations

import pytest

from tooling.testing.campaign.campaign import Campaign
from tooling.testing.model_server import ModelServer
from tooling.testing.system import System

SEED, COUNT, CONVERSATIONS = 7, 4, 6
# Those that change nothing in a system that other tests share.
FAULTS = ("kill", "engines", "rewind", "poison", "duplicates", "reorder")
TARGETS = ("channel", "agent", "billing", "rabbitmq", "kafka:usage.records", "rabbit:channel.outbound")


@pytest.mark.timeout(900)
async def test_faults_under_load_break_no_invariant(system: System, models: ModelServer) -> None:
    lines: list[str] = []
    campaign = Campaign(system, models, SEED, FAULTS, conversations=CONVERSATIONS)
    report = await campaign.run(COUNT, lines.append, TARGETS)
    print(report, lines)  # noqa: T201 - for a failure
    assert len(report.injected) == COUNT
    assert report.accepted > COUNT
    found = {verdict.name: [v.what for v in verdict.violations] for verdict in report.invariants if not verdict.held}
    assert found == {}, report.shown
    assert report.held
