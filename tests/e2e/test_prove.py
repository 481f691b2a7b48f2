"""A short campaign of random kills on the running system; `./claw prove` runs a longer one on a system of its own."""

from __future__ import annotations

import pytest

from tooling.testing.campaign import Campaign
from tooling.testing.model_server import ModelServer
from tooling.testing.system import System
from tooling.testing.vendors import WebhookStandIn

SEED, KILLS, CONVERSATIONS = 7, 4, 6


@pytest.mark.timeout(900)
async def test_kills_under_load_lose_double_and_misbill_no_message(system: System, models: ModelServer) -> None:
    lines: list[str] = []
    async with WebhookStandIn() as vendor:
        campaign = Campaign(system, models, vendor, SEED, CONVERSATIONS)
        report = await campaign.run(KILLS, lines.append, ("channel", "agent", "billing", "rabbitmq"))
    print(report, lines)  # noqa: T201 - for a failure
    assert len(report.kills) == KILLS
    assert report.accepted > KILLS
    assert (report.lost, report.answered_twice, report.out_of_order) == ([], [], []), lines
    assert (report.unexpected, report.bill) == ([], []), lines
    assert report.held
