"""SIGKILL of each service at each boundary of a message's way: answered once, shown once or unknown, billed exactly."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.conftest import SERVICES_ON_THE_WAY
from tooling.testing.platform import Platform
from tooling.testing.vendors import TelegramStandIn

# A person sees one message. If the vendor takes no key and the process died during the call, the person sees one or
# none, and the delivery says so.
ONCE, UNKNOWN = "once", "unknown"
# Each service's own tests have all of its boundaries; here are those at which the way passes from one to the next.
POINTS = (
    ("channel", "after_commit", ONCE),
    ("channel", "after_publish_before_mark", ONCE),
    ("channel", "after_commit_before_ack", ONCE),
    ("channel", "after_effect_started", UNKNOWN),
    ("channel", "after_effect_call", UNKNOWN),
    ("channel", "before_lane_commit", ONCE),
    ("agent", "after_commit_before_ack", ONCE),
    ("agent", "after_publish_before_mark", ONCE),
    ("agent", "after_effect_call", ONCE),
    ("agent", "after_effect_commit", ONCE),
    ("agent", "after_lane_commit", ONCE),
    ("billing", "after_effect_before_commit", ONCE),
    ("billing", "after_commit_of_batch", ONCE),
    ("plugin", "before_commit", ONCE),
    ("plugin", "after_commit", ONCE),
)


@pytest.mark.parametrize(("service", "point", "seen"), POINTS, ids=[f"{s}-{p}" for s, p, _ in POINTS])
async def test_a_service_that_dies_on_the_way_changes_nothing_about_the_end(
    platform: Platform, tenant: str, tmp_path: Path, service: str, point: str, seen: str
) -> None:
    async with TelegramStandIn() as vendor:
        async with platform.client("agent", tenant) as api:
            body = {"name": point, "model": "scripted/answer", "system_prompt": "Be brief.", "tools": ["calculator"]}
            agent = (await api.post("/api/v1/agents", json=body)).json()["id"]
        async with platform.client("channel", tenant) as api:
            account = {
                "type": "telegram",
                "agent_id": agent,
                "credentials": vendor.credentials,
                "api_base": vendor.url,
            }
            path = (await api.post("/api/v1/channels", json=account)).json()["webhook_path"]
        marker = tmp_path / "armed"
        await asyncio.to_thread(platform.stop, service)
        await platform.start(service, CLAW_FAILPOINT=point, CLAW_FAILPOINT_ONCE=str(marker))
        marker.touch()

        update = vendor.update("What is 6 * 7?")
        accepted = await post(platform, path, update)
        assert await asyncio.to_thread(platform.processes[service].wait, 60) == -signal.SIGKILL
        await platform.start(service)
        if not accepted:
            # As the vendor does, when it was not told 200.
            await platform.until(lambda: post(platform, path, update))

        run = await ended(platform, tenant, agent)
        assert run["status"] == "completed", run
        assert [(step["kind"], step["status"]) for step in run["steps"]] == [
            ("model", "completed"),
            ("tool", "completed"),
            ("model", "completed"),
        ]
        delivery = await delivered(platform, tenant, run["id"])
        if seen == UNKNOWN:
            assert delivery["state"] == "unknown"
            assert len(vendor.ledger) == (1 if point == "after_effect_call" else 0)
        else:
            assert delivery["state"] in ("sent", "delivered")
            assert vendor.texts() == [run["reply"]]
        await billed(platform, tenant, run["id"])


async def post(platform: Platform, path: str, update: tuple[bytes, dict[str, str]]) -> bool:
    body, headers = update
    async with httpx.AsyncClient(base_url=platform.url("channel"), trust_env=False, timeout=30) as vendor:
        try:
            answer = await vendor.post(path, content=body, headers=headers)
        except httpx.TransportError:
            return False
        return answer.status_code == 200


async def ended(platform: Platform, tenant: str, agent: str) -> dict[str, Any]:
    """The agent's one run, once it has ended."""

    async def found() -> dict[str, Any] | None:
        async with platform.client("agent", tenant) as api:
            items = (await api.get("/api/v1/runs", params={"agent_id": agent})).json()["items"]
            assert len(items) <= 1, items
            if not items or items[0]["status"] in ("queued", "running", "waiting"):
                return None
            run: dict[str, Any] = (await api.get(f"/api/v1/runs/{items[0]['id']}")).json()
            return run

    return await platform.until(found)


async def delivered(platform: Platform, tenant: str, run_id: str) -> dict[str, Any]:
    """The run's one delivery, once it is over."""

    async def found() -> dict[str, Any] | None:
        async with platform.client("channel", tenant) as api:
            items = (await api.get("/api/v1/deliveries", params={"run_id": run_id})).json()["items"]
        assert len(items) <= 1, items
        return items[0] if items and items[0]["state"] != "queued" else None

    return await platform.until(found)


async def billed(platform: Platform, tenant: str, run_id: str) -> None:
    """All usage records of the run are counted, no others are, and the run's cost is their sum."""

    async def produced() -> set[str]:
        """The records of the services, and the one that billing makes of each delivered message."""
        bodies = [one for service in SERVICES_ON_THE_WAY for one in await platform.outbox(service, "usage.records")]
        told = await platform.outbox("channel", "channel.events")
        delivered = [body for headers, body in told if headers["ce_type"].endswith("MessageDelivered")]
        messages = {f"message/{body['delivery_id']}" for body in delivered if body["run_id"] == run_id}
        return messages | {body["usage_id"] for _, body in bodies if body.get("run_id") == run_id}

    async def charges() -> list[dict[str, Any]] | None:
        async with platform.client("agent", tenant) as api:
            items = (await api.get(f"/api/v1/runs/{run_id}/timeline")).json()["items"]
        found = [item["data"] for item in items if item["kind"] == "charge"]
        return found if {charge["usage_id"] for charge in found} == await produced() and len(found) >= 2 else None

    found = await platform.until(charges)
    counted = sorted(charge["usage_id"] for charge in found if charge["verdict"] == "counted")
    assert counted == sorted({charge["usage_id"] for charge in found})
    async with platform.client("agent", tenant) as api:
        run = (await api.get(f"/api/v1/runs/{run_id}")).json()
    assert run["cost_nanos"] == sum(charge["amount_nanos"] for charge in found)
    async with platform.client("billing", tenant) as api:
        ledger = (await api.get("/api/v1/billing/ledger", params={"limit": 200})).json()["items"]
    entries = [entry for entry in ledger if entry.get("usage_id") in counted]
    assert sorted(entry["usage_id"] for entry in entries) == counted
