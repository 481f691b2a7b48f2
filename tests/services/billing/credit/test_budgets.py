"""Budgets hold under any concurrency, alert once, and name themselves when they refuse."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

import pytest
from redis.asyncio import Redis

from infra.clock import utcnow, uuid7
from infra.errors import Transient
from infra.stores.cache import Cache, cancel_listener
from infra.web import rpc
from protos.billing.v1 import billing_pb2
from protos.catalog import USAGE_RECORDS
from protos.messages.billing import UsageRecorded
from protos.pubsub import QUOTA_EXHAUSTED
from services.billing.credit.budgets import MAX_BUDGETS
from tests.services.billing.conftest import Billing, Tenant

T = TypeVar("T")

TOKEN = 150


async def limit(tenant: Tenant, scope: str, id_: str, nanos: int, **more: Any) -> dict[str, Any]:
    body = {"scope": scope, "id": id_, "nanos": nanos, "period": "month", **more}
    answer = await tenant.http.post("/api/v1/budgets", json=body)
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def reserve(tenant: Tenant, tokens: int, expires_in_ms: Any = 60_000, **names: Any) -> billing_pb2.ReserveReply:
    request = billing_pb2.ReserveRequest(
        hold_id=names.pop("hold_id", str(uuid7())),
        resource="openai/gpt-4o-mini",
        quantities={"input_tokens": tokens},
        expires_in_ms=expires_in_ms,
        **names,
    )
    return await tenant.stub().Reserve(request, metadata=rpc.tenant_metadata(tenant.id), timeout=120)


async def use(tenant: Tenant, usage_id: str, tokens: int, **names: Any) -> None:
    record = UsageRecorded(
        tenant_id=tenant.id,
        usage_id=usage_id,
        resource="openai/gpt-4o-mini",
        quantities={"input_tokens": tokens, "output_tokens": 0},
        occurred_at=utcnow(),
        **names,
    )
    await tenant.platform.produce(USAGE_RECORDS, record, key=tenant.id)


async def spent(tenant: Tenant) -> dict[str, tuple[int, int]]:
    items = (await tenant.http.get("/api/v1/budgets")).json()["items"]
    return {item["scope"]: (item["spent_nanos"], item["held_nanos"]) for item in items}


@pytest.mark.parametrize(
    ("scope", "field"),
    [("agent", "agent_id"), ("channel", "channel_id"), ("session", "session_key"), ("key", "api_key_id")],
)
async def test_each_scope_is_held_and_spent_by_the_uses_that_name_it(billing: Billing, scope: str, field: str) -> None:
    tenant = await billing.tenant()
    id_, hold_id = uuid7(), uuid7()
    await limit(tenant, scope, str(id_), 10 * TOKEN)
    assert (await reserve(tenant, 11)).granted, "a use that does not name it is free"
    refused = await reserve(tenant, 11, **{field: str(id_)})
    assert (refused.granted, refused.available_nanos) == (False, 10 * TOKEN)
    assert refused.refused_by == f"{scope}, 0.0000015 a month"
    assert (await reserve(tenant, 6, hold_id=str(hold_id), **{field: str(id_)})).granted
    assert not (await reserve(tenant, 5, **{field: str(id_)})).granted
    name: Any = id_ if field in ("agent_id", "channel_id") else str(id_)
    await use(tenant, "a", 2, hold_id=hold_id, **{field: name})
    await tenant.verdict("a")
    assert await spent(tenant) == {scope: (2 * TOKEN, 0)}
    assert (await reserve(tenant, 8, **{field: str(id_)})).granted


async def test_the_smallest_rest_of_the_hierarchy_decides(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=100 * TOKEN)
    await limit(tenant, "tenant", "", 50 * TOKEN)
    await limit(tenant, "agent", "a", 20 * TOKEN)
    reply = await reserve(tenant, 15, agent_id="a")
    assert (reply.granted, reply.available_nanos) == (True, 5 * TOKEN)
    assert (await reserve(tenant, 6, agent_id="a")).refused_by.startswith("agent, ")
    assert (await reserve(tenant, 36)).refused_by.startswith("tenant, ")
    assert (await reserve(tenant, 35)).granted
    assert not (await reserve(tenant, 1, agent_id="a")).granted


async def test_64_concurrent_spenders_with_crashes_pass_a_budget_by_at_most_one_step(billing: Billing) -> None:
    tenant = await billing.tenant()
    step, steps = 10, 40
    await limit(tenant, "agent", str(agent := uuid7()), steps * step * TOKEN)
    rng = random.Random(3)
    counted: list[str] = []

    async def steadily(call: Callable[[], Awaitable[T]]) -> T:
        """Repeats a call until the service answers: it is killed and started meanwhile."""

        async def answer() -> tuple[T] | None:
            try:
                return (await call(),)
            except Transient:
                return None

        [found] = await tenant.platform.until(answer)
        return found

    async def spender(n: int) -> None:
        for turn in range(3):
            hold_id = uuid7()
            fate = rng.random()
            # A caller that dies leaves its hold, which expires. A repeated request is one hold.
            expires = 1 if fate < 0.2 else 600_000
            ask = partial(reserve, tenant, step, expires, hold_id=str(hold_id), agent_id=str(agent))
            replies = [await steadily(ask) for _ in range(1 + (fate > 0.8))]
            # A hold that was refused is decided again; one that was granted stays granted.
            granted = [reply.granted for reply in replies]
            assert granted == sorted(granted)
            if not granted[-1] or fate < 0.2:
                continue
            if fate < 0.3:
                await steadily(partial(tenant.release, hold_id))
                continue
            for _ in range(1 + (fate > 0.9)):
                await use(tenant, f"s/{n}/{turn}", step, hold_id=hold_id, agent_id=agent)
            counted.append(f"s/{n}/{turn}")

    async def crash() -> None:
        async def begun() -> bool:
            return len(counted) >= 5

        await tenant.platform.until(begun)
        tenant.platform.kill("billing")
        await tenant.platform.start("billing")

    await asyncio.gather(crash(), *(spender(n) for n in range(64)))
    for usage_id in counted:
        await tenant.verdict(usage_id)

    async def free() -> bool:
        return (await spent(tenant))["agent"][1] == 0

    await tenant.platform.until(free)
    total, held = (await spent(tenant))["agent"]
    assert total == len(counted) * step * TOKEN
    assert total <= (steps + 1) * step * TOKEN
    assert held == 0, "no hold has leaked"
    assert (await tenant.get("balance"))["held_nanos"] == 0


async def subjects(tenant: Tenant) -> list[str]:
    mails = await tenant.platform.outbox("billing", "notification")
    return [body["subject"] for headers, body in mails if headers.get("tenant_id") == tenant.id]


async def events(tenant: Tenant) -> list[tuple[Any, ...]]:
    found = await tenant.platform.outbox("billing", "platform.events")
    fields = ("scope", "scope_id", "period", "percent", "nanos", "spent_nanos")
    return [tuple(b[field] for field in fields) for h, b in found if h.get("tenant_id") == tenant.id]


async def test_each_threshold_alerts_once_in_a_period(billing: Billing) -> None:
    tenant = await billing.tenant()
    await limit(tenant, "tenant", "", 100 * TOKEN, soft_percent=[50, 80])
    for n, tokens in enumerate((49, 1, 10, 25, 20)):
        await use(tenant, f"a/{n}", tokens)
        await use(tenant, f"a/{n}", tokens)
        await tenant.verdict(f"a/{n}")

    assert await subjects(tenant) == [f"{percent} % of a budget is spent" for percent in (50, 80, 100)]
    spends = ((50, 50), (80, 85), (100, 105))
    assert await events(tenant) == [("tenant", "", "month", n, 100 * TOKEN, spent * TOKEN) for n, spent in spends]
    # A new period begins with nothing spent, and may alert again.
    await tenant.sql(
        "UPDATE budget SET window_starts = window_starts - interval '2 months' WHERE tenant_id = $1", tenant.id
    )
    assert await spent(tenant) == {"tenant": (0, 0)}
    await use(tenant, "b", 60)
    await tenant.verdict("b")
    assert await spent(tenant) == {"tenant": (60 * TOKEN, 0)}
    assert (await subjects(tenant))[3:] == ["50 % of a budget is spent"]
    assert [event[3] for event in (await events(tenant))[3:]] == [50]


async def test_another_limit_misses_no_alert_and_repeats_none(billing: Billing) -> None:
    tenant = await billing.tenant()
    told: list[tuple[int, int, int]] = []

    async def alerts(*expected: tuple[int, int, int]) -> None:
        told.extend(expected)
        assert [event[3:] for event in await events(tenant)] == [(n, a * TOKEN, b * TOKEN) for n, a, b in told]
        assert await subjects(tenant) == [f"{n} % of a budget is spent" for n, _, _ in told]

    await limit(tenant, "tenant", "", 200 * TOKEN, soft_percent=[80])
    await use(tenant, "a", 90)
    await tenant.verdict("a")
    await alerts()
    for _ in range(2):
        await limit(tenant, "tenant", "", 100 * TOKEN, soft_percent=[80])
    await alerts((80, 100, 90))
    await limit(tenant, "tenant", "", 200 * TOKEN, soft_percent=[80])
    await use(tenant, "b", 75)
    await tenant.verdict("b")
    await alerts()
    await limit(tenant, "tenant", "", 150 * TOKEN, soft_percent=[80])
    await alerts((100, 150, 165))
    # A new one is above its thresholds already, one is not, and nothing may be spent of the last one, but nothing is.
    await limit(tenant, "tenant", "", 200 * TOKEN, period="total", soft_percent=[50, 90])
    await limit(tenant, "agent", "x", 0, soft_percent=[50])
    await alerts((50, 200, 165))
    # A limit that is changed in the next period counts that period.
    await tenant.sql(
        "UPDATE budget SET window_starts = window_starts - interval '2 months' WHERE tenant_id = $1", tenant.id
    )
    await limit(tenant, "tenant", "", 50 * TOKEN, soft_percent=[80])
    await alerts()
    await use(tenant, "c", 40)
    await tenant.verdict("c")
    await alerts((80, 50, 40))


async def test_a_rate_refuses_what_does_not_fit_into_a_minute_and_sends_no_alerts(billing: Billing) -> None:
    tenant = await billing.tenant()
    made = await limit(tenant, "tenant", "", 10 * TOKEN, period="minute")
    assert (made["period"], made["soft_percent"]) == ("minute", [])
    hold_id, refused_id = uuid7(), str(uuid7())
    assert (await reserve(tenant, 6, hold_id=str(hold_id))).granted
    for _ in range(2):
        refused = await reserve(tenant, 5, hold_id=refused_id)
        assert (refused.granted, refused.retry_later) == (False, True)
        assert refused.refused_by == "tenant, 0.0000015 a minute"
    never = await reserve(tenant, 11)
    assert (never.granted, never.retry_later) == (False, False)
    await use(tenant, "a", 10, hold_id=hold_id)
    await tenant.verdict("a")
    earlier = "UPDATE budget SET window_starts = window_starts - interval '1 minute' WHERE tenant_id = $1"
    await tenant.sql(earlier, tenant.id)
    assert await spent(tenant) == {"tenant": (0, 0)}
    assert (await reserve(tenant, 10)).granted
    for bus in ("notification", "platform.events"):
        assert [h for h, _ in await billing.platform.outbox("billing", bus) if h.get("tenant_id") == tenant.id] == []


async def test_exhausted_credit_and_budgets_are_told_on_redis_once(billing: Billing) -> None:
    heard: list[dict[str, Any]] = []
    listens = asyncio.Event()

    async def listen(cache: Cache) -> None:
        async with aclosing(cache.listen(QUOTA_EXHAUSTED)) as messages:
            async for message in messages:
                listens.set()
                if message:
                    heard.append(json.loads(message[1]))

    async with Redis.from_url(billing.platform.stack.redis_url) as redis:
        listening = asyncio.create_task(listen(Cache(redis)))
        await listens.wait()
        tenant, last = await billing.tenant(credit_nanos=30 * TOKEN), await billing.tenant(credit_nanos=TOKEN)
        budget = await limit(tenant, "tenant", "", 10 * TOKEN, soft_percent=[50])
        for usage_id, tokens in (("a", 6), ("b", 6), ("b", 6)):
            await use(tenant, usage_id, tokens)
        # In one batch with the last record, the budget would be passed with the sum of all.
        await tenant.verdict("b")
        await use(tenant, "c", 20)
        await tenant.verdict("c")
        await use(last, "a", 2)

        async def hears() -> bool:
            # Other tests may use this Redis at the same time.
            of = [message["tenant_id"] for message in heard]
            return of.count(tenant.id) >= 2 and last.id in of

        await billing.platform.until(hears)
        await cancel_listener(listening)
    credit, passed = sorted((m for m in heard if m["tenant_id"] == tenant.id), key=len)
    assert credit == {"tenant_id": tenant.id, "currency": "USD", "balance_nanos": -2 * TOKEN}
    assert passed == {
        "tenant_id": tenant.id,
        "budget_id": budget["id"],
        "scope": "tenant",
        "scope_id": "",
        "period": "month",
        "percent": 100,
        "nanos": 10 * TOKEN,
        "spent_nanos": 12 * TOKEN,
    }


async def test_a_new_budget_counts_the_usage_of_its_period_so_far(billing: Billing) -> None:
    tenant = await billing.tenant()
    await use(tenant, "a", 7)
    await tenant.verdict("a")
    assert (await limit(tenant, "tenant", "", 10 * TOKEN))["spent_nanos"] == 7 * TOKEN
    changed = await limit(tenant, "tenant", "", 20 * TOKEN)
    assert (changed["nanos"], changed["spent_nanos"]) == (20 * TOKEN, 7 * TOKEN)


async def test_a_resource_without_a_price_holds_the_rest_of_a_budget(billing: Billing) -> None:
    tenant = await billing.tenant()
    await limit(tenant, "tenant", "", 1000)
    request = billing_pb2.ReserveRequest(
        hold_id=str(uuid7()), resource="acme/unheard-of", quantities={"input_tokens": 500}, expires_in_ms=60_000
    )
    reply = await tenant.stub().Reserve(request, metadata=rpc.tenant_metadata(tenant.id))
    assert (reply.granted, reply.held_nanos, reply.available_nanos) == (True, 1000, 0)
    assert not (await reserve(tenant, 1)).granted


async def test_budgets_are_removed_by_their_tenant_only_and_wrong_ones_refused(billing: Billing) -> None:
    tenant, other = await billing.tenant(), await billing.tenant()
    made = await limit(tenant, "tenant", "", 1)
    assert (await other.http.delete(f"/api/v1/budgets/{made['id']}")).status_code == 404
    assert (await tenant.http.delete(f"/api/v1/budgets/{made['id']}")).status_code == 204
    assert await spent(tenant) == {}
    for body, field in (
        ({"scope": "agent", "nanos": 1, "period": "day"}, "id"),
        ({"scope": "tenant", "id": "x", "nanos": 1, "period": "day"}, "id"),
        ({"scope": "tenant", "nanos": -1, "period": "day"}, "nanos"),
        ({"scope": "tenant", "nanos": 1, "period": "week"}, "period"),
        ({"scope": "tenant", "nanos": 1, "period": "minute", "soft_percent": [80]}, "soft_percent"),
        ({"scope": "tenant", "nanos": 1, "period": "day", "soft_percent": [101]}, "soft_percent[0]"),
    ):
        answer = await tenant.http.post("/api/v1/budgets", json=body)
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["field"] == field, answer.text


async def test_a_tenant_has_a_limited_number_of_budgets(billing: Billing) -> None:
    tenant = await billing.tenant()
    await limit(tenant, "agent", "first", 1)
    await tenant.sql(
        """
        INSERT INTO budget (tenant_id, budget_id, scope, scope_id, period, nanos, soft_percent, window_starts)
        SELECT $1, gen_random_uuid(), 'session', n::text, 'month', 1, '{}', now() FROM generate_series(2, $2) AS n
        """,
        tenant.id,
        MAX_BUDGETS,
    )
    answer = await tenant.http.post(
        "/api/v1/budgets", json={"scope": "agent", "id": "another", "nanos": 1, "period": "month"}
    )
    assert (answer.status_code, answer.json()["detail"]) == (409, "a tenant may have 1000 budgets; remove one first")
    assert (await limit(tenant, "agent", "first", 2))["nanos"] == 2
