"""Billing counts every record once, even if it is killed at any transaction boundary."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.clock import uuid7
from tests.services.billing.conftest import Billing

TOKEN = 150


@pytest.mark.parametrize(
    "place", ["after_effect_before_commit", "before_commit", "after_commit", "after_commit_of_batch"]
)
async def test_killed_at_a_boundary_it_loses_nothing_and_counts_nothing_twice(
    billing: Billing, place: str, tmp_path: Path
) -> None:
    platform = billing.platform
    tenant = await billing.tenant(credit_nanos=100 * TOKEN)
    hold_id = uuid7()
    assert (await tenant.reserve(hold_id=hold_id, input_tokens=80)).granted
    platform.stop("billing")
    for n in range(30):
        # Every third record is reported again in a new message. The last ones exhaust the credit.
        await tenant.use(f"run/{n - n % 3 // 2}", hold_id=hold_id if n == 0 else None, input_tokens=6, output_tokens=0)

    marker = tmp_path / "once"
    marker.touch()
    platform.spawn("billing", CLAW_FAILPOINT=place, CLAW_FAILPOINT_ONCE=str(marker))

    async def killed() -> bool:
        return platform.processes["billing"].poll() is not None

    await platform.until(killed)
    assert not marker.exists()
    await platform.start("billing")

    async def told() -> bool:
        [(count,)] = await tenant.sql(
            "SELECT (SELECT count(*) FROM usage WHERE tenant_id = $1) + "
            "(SELECT count(*) FROM duplicate WHERE tenant_id = $1)",
            tenant.id,
        )
        return bool(count == 30)

    await platform.until(told)
    balance = await tenant.get("balance")
    assert balance["debited_nanos"] == 20 * 6 * TOKEN
    assert (balance["balance_nanos"], balance["held_nanos"]) == (-20 * TOKEN, 0)
    entries = (await tenant.get("ledger"))["items"]
    assert len(entries) == 1 + 20
    assert sum(entry["amount_nanos"] for entry in entries) == balance["balance_nanos"]
    told_once = [
        body for _, body in await platform.outbox("billing", "platform.events") if body["tenant_id"] == tenant.id
    ]
    assert len(told_once) == 1
