"""The dead letters of several services in one list. Each service is asked for its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest

from infra.clock import utcnow, uuid7
from infra.postgres.dead_letters import DeadLetter, store_dead_letters
from protos.catalog import PLATFORM_EVENTS, SERVICE_LOGS
from protos.envelope import Envelope
from protos.messages.user import SubjectErased
from tooling.testing.platform import Platform


@pytest.fixture(scope="module")
async def services(aggregator: Platform) -> AsyncIterator[Platform]:
    """Starts the user service too. The other services do not run."""
    await aggregator.prepare("user")
    await aggregator.start("user")
    yield aggregator
    aggregator.stop("user")


async def fail(
    services: Platform, service: str, tenant_id: str, subject: str = "s", error: str = "ValueError: it was late"
) -> str:
    """Stores a dead letter of this service that a redrive would process. Returns its id."""
    message = SubjectErased(tenant_id=tenant_id, subject_id=subject)
    envelope = Envelope(
        id=uuid7(), source="user", type=message.wire_name(), time=utcnow(), subject=tenant_id, tenant_id=tenant_id
    )
    letter = DeadLetter(
        destination=PLATFORM_EVENTS.name,
        place="x/0/1",
        message_id=str(envelope.id),
        key=tenant_id,
        tenant_id=tenant_id,
        attempts=3,
        error=error,
        headers=_json(envelope.headers()),
        payload=_json({"tenant_id": tenant_id, "subject_id": subject}).encode(),
    )
    async with services.database(service).begin() as tx:
        await store_dead_letters(await tx.connection(), service, "kafka", [letter], services.database(service).sealing)
        [(id_,)] = await tx.sql("SELECT id FROM dead_letter WHERE message_id = $1", letter.message_id)
    return str(id_)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


async def state(services: Platform, service: str, id_: str) -> str:
    async with services.database(service).begin() as tx:
        [(found,)] = await tx.sql("SELECT state FROM dead_letter WHERE id = $1", UUID(id_))
    return str(found)


async def test_a_tenant_finds_its_own_of_all_services_in_pages(services: Platform, tenant: str) -> None:
    wanted = [await fail(services, name, tenant) for name in ("log_aggregator", "user", "user")]
    await fail(services, "user", "another tenant")
    async with services.client("log_aggregator", tenant) as client:
        seen: list[dict[str, Any]] = []
        cursor: dict[str, str] = {}
        while True:
            answer = await client.get("/api/v1/deadletters", params={"limit": "1", **cursor})
            assert answer.status_code == 200, answer.text
            body = answer.json()
            # The services that do not run here. A page that begins after a service does not ask it.
            assert set(body["unavailable"]) <= {
                "agent",
                "billing",
                "channel",
                "memory",
                "notification",
                "plugin",
                "ws_gateway",
            }
            seen += body["items"]
            if not body["next"]:
                break
            cursor = {"cursor": body["next"]}
        assert [letter["id"] for letter in seen] == wanted
        assert [letter["service"] for letter in seen] == ["log_aggregator", "user", "user"]
        letter = (await client.get(f"/api/v1/deadletters/{wanted[1]}")).json()
    assert letter["source"] == "kafka:platform.events"
    assert (letter["attempts"], letter["error"], letter["state"]) == (3, "ValueError: it was late", "failed")
    assert letter["payload"] == _json({"tenant_id": tenant, "subject_id": "s"})
    assert letter["key"] == letter["tenant_id"] == tenant
    assert letter["first_failed_at"].endswith("Z")
    assert seen[1]["payload"] is None


async def test_a_dead_letter_of_another_tenant_is_not_found_and_the_operator_sees_all(
    services: Platform, tenant: str
) -> None:
    id_ = await fail(services, "user", tenant)
    for other, status in ((str(uuid4()), 503), ("", 200)):
        async with services.client("log_aggregator", other) as client:
            # Some services do not answer here, so it is not known that no service has it.
            assert (await client.get(f"/api/v1/deadletters/{id_}")).status_code == status
    async with services.client("log_aggregator", str(uuid4())) as client:
        assert (await client.post(f"/api/v1/deadletters/{id_}/redrive")).status_code == 503
        assert (await client.delete(f"/api/v1/deadletters/{id_}")).status_code == 503
        assert (await client.get("/api/v1/deadletters", params={"cursor": "eA=="})).status_code == 422
    async with services.client("log_aggregator", tenant, scopes=("read", "run")) as client:
        assert (await client.post(f"/api/v1/deadletters/{id_}/redrive")).status_code == 403
    assert await state(services, "user", id_) == "failed"


async def test_a_redriven_dead_letter_is_processed_and_audited(services: Platform, tenant: str) -> None:
    subject = str(uuid4())
    id_ = await fail(services, "user", tenant, subject)
    async with services.client("log_aggregator", tenant, actor="member:m") as client:
        answer = await client.post(f"/api/v1/deadletters/{id_}/redrive")
        assert answer.status_code == 202, answer.text

        async def redriven() -> bool:
            return await state(services, "user", id_) == "redriven"

        await services.until(redriven)
        assert (await client.post(f"/api/v1/deadletters/{id_}/redrive")).status_code == 409
    async with services.database("user").begin() as tx:
        assert await tx.sql("SELECT 1 FROM subject_key WHERE subject_id = $1 AND wrapped IS NULL", subject)
    acts = [act for _, act in await services.outbox("user", "audit.logs") if act["object_id"] == id_]
    assert [(act["actor"], act["action"], act["tenant_id"]) for act in acts] == [
        ("member:m", "dead_letter.redrive", tenant)
    ]


async def test_dead_letters_are_grouped_by_cause_and_redriven_by_it(services: Platform, tenant: str) -> None:
    subject = str(uuid4())
    first = await fail(services, "user", tenant, subject, error="TimeoutError: after 7 s\nprivate")
    await fail(services, "user", tenant, error="TimeoutError: after 8 s")
    await fail(services, "log_aggregator", tenant)
    other = await fail(services, "user", "another tenant", error="TimeoutError: after 9 s")
    async with services.client("log_aggregator", tenant, actor="member:m") as client:
        groups: list[dict[str, Any]] = []
        cursor: dict[str, str] = {}
        while True:
            answer = await client.get("/api/v1/deadletters", params={"group_by": "cause", "limit": "1", **cursor})
            assert answer.status_code == 200, answer.text
            groups += answer.json()["items"]
            if not answer.json()["next"]:
                break
            cursor = {"cursor": answer.json()["next"]}
        shown = [(group["service"], group["cause"], group["failed"]) for group in groups]
        assert shown == [("log_aggregator", "ValueError: it was late", 1), ("user", "TimeoutError: after # s", 2)]
        assert groups[1]["first_id"] == first
        wanted = {"cause": "TimeoutError: after # s"}
        answer = await client.post("/api/v1/deadletters/redrive", json=wanted | {"dry_run": True})
        assert answer.status_code == 202, answer.text
        assert (answer.json()["dry_run"], answer.json()["matched"], answer.json()["redriven"]) == (True, 2, 2)
        assert await state(services, "user", first) == "failed"
        answer = await client.post("/api/v1/deadletters/redrive", json=wanted | {"rate_per_s": 100})
        assert answer.json()["services"] == [{"service": "user", "matched": 2, "redriven": 2, "too_old": 0}]

        async def redriven() -> bool:
            return await state(services, "user", first) == "redriven"

        await services.until(redriven)
    assert await state(services, "user", other) == "failed"
    acts = [act for _, act in await services.outbox("user", "audit.logs") if act["tenant_id"] == tenant]
    assert [(act["actor"], act["action"], act["object_id"], act["details"]["count"]) for act in acts] == [
        ("member:m", "dead_letter.redrive_all", wanted["cause"], "2")
    ]


async def test_ids_are_redriven_together_or_not_at_all(services: Platform, tenant: str) -> None:
    mine = [await fail(services, name, tenant) for name in ("log_aggregator", "user")]
    theirs = await fail(services, "user", "another tenant")
    async with services.client("log_aggregator", tenant) as client:
        # Services that do not run here might have it.
        answer = await client.post("/api/v1/deadletters/redrive", json={"ids": [*mine, theirs]})
        assert answer.status_code == 503, answer.text
        for service, id_ in (("log_aggregator", mine[0]), ("user", mine[1]), ("user", theirs)):
            assert await state(services, service, id_) == "failed"
        answer = await client.post("/api/v1/deadletters/redrive", json={"ids": mine, "rate_per_s": 0.01})
        assert (answer.status_code, answer.json()["redriven"]) == (202, 2)
    assert await state(services, "user", theirs) == "failed"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "ids"),
        ({"dry_run": True}, "ids"),
        ({"ids": [str(uuid4())], "cause": "x"}, "ids"),
        ({"ids": []}, "ids"),
        ({"ids": ["7"]}, "ids[0]"),
        ({"service": "unknown-service"}, "service"),
        ({"cause": "x", "rate_per_s": 0}, "rate_per_s"),
        ({"cause": "x", "all": True}, "all"),
    ],
)
async def test_an_unclear_bulk_redrive_is_refused(
    services: Platform, tenant: str, body: dict[str, Any], field: str
) -> None:
    id_ = await fail(services, "user", tenant, error="x")
    async with services.client("log_aggregator", tenant) as client:
        answer = await client.post("/api/v1/deadletters/redrive", json=body)
    assert answer.status_code == 422, answer.text
    assert [error["field"] for error in answer.json()["errors"]] == [field]
    assert await state(services, "user", id_) == "failed"


async def test_reading_a_dead_letter_is_audited(services: Platform, tenant: str) -> None:
    id_ = await fail(services, "user", tenant)
    async with services.client("log_aggregator", tenant, actor="member:m") as client:
        assert (await client.get(f"/api/v1/deadletters/{id_}")).status_code == 200
    async with services.client("log_aggregator", "") as client:
        assert (await client.get(f"/api/v1/deadletters/{id_}")).status_code == 200
    acts = [act for _, act in await services.outbox("log_aggregator", "audit.logs") if act["object_id"] == id_]
    assert [(act["actor"], act["action"], act["tenant_id"], act["details"]["service"]) for act in acts] == [
        ("member:m", "dead_letter.read", tenant, "user"),
        ("operator", "dead_letter.read", None, "user"),
    ]


async def test_a_discarded_dead_letter_is_not_listed(services: Platform, tenant: str) -> None:
    id_ = await fail(services, "log_aggregator", tenant)
    async with services.client("log_aggregator", tenant) as client:
        assert (await client.delete(f"/api/v1/deadletters/{id_}")).status_code == 204
        assert (await client.get("/api/v1/deadletters")).json()["items"] == []
    assert await state(services, "log_aggregator", id_) == "discarded"


async def test_a_line_that_could_not_be_indexed_is_indexed_by_a_redrive(services: Platform) -> None:
    """The readers of the search index have dead letters like all other readers."""
    word = f"word{uuid4().hex}"
    envelope = Envelope(id=uuid7(), source="agent", type="logs.v1.LogLine", time=utcnow())
    line: dict[str, Any] = {
        "timestamp": utcnow().isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        **{"level": "info", "service": "agent", "traceId": None, "spanId": None, "message": word, "data": {}},
    }
    letter = DeadLetter(
        destination=SERVICE_LOGS.name,
        place="x/0/1",
        message_id=str(envelope.id),
        key="agent",
        tenant_id=None,
        attempts=1,
        error="InvalidMessage: document: refused",
        headers=_json(envelope.headers()),
        payload=_json(line).encode(),
    )
    async with services.database("log_aggregator").begin() as tx:
        await store_dead_letters(
            await tx.connection(),
            "log_aggregator_index",
            "kafka",
            [letter],
            services.database("log_aggregator").sealing,
        )
        [(id_,)] = await tx.sql("SELECT id FROM dead_letter WHERE message_id = $1", letter.message_id)
    async with services.client("log_aggregator") as operator:
        assert (await operator.post(f"/api/v1/deadletters/{id_}/redrive")).status_code == 202

        async def found() -> bool:
            return bool((await operator.get("/api/v1/logs", params={"q": word})).json()["items"])

        await services.until(found)
    assert await state(services, "log_aggregator", str(id_)) == "redriven"


async def test_the_status_shows_services_that_answer_and_the_engines_that_they_reach(
    services: Platform, tenant: str
) -> None:
    """The other services do not run here."""
    for who in (tenant, ""):
        async with services.client("log_aggregator", who) as client:
            answer = await client.get("/api/v1/status")
        assert answer.status_code == 200, answer.text
        parts = {part["name"]: part for part in answer.json()["parts"]}
        assert answer.json()["status"] == "failed"
        assert (parts["billing"]["kind"], parts["billing"]["state"], parts["billing"]["version"]) == (
            "service",
            "failed",
            None,
        )
        for name in ("user", "log_aggregator"):
            assert (parts[name]["kind"], parts[name]["state"]) == ("service", "ready")
            assert parts[name]["version"]
        for name in ("postgres", "kafka", "opensearch"):
            assert (parts[name]["kind"], parts[name]["state"], parts[name]["unreachable_from"]) == (
                "engine",
                "ready",
                [],
            )
        assert list(parts) == sorted(parts, key=lambda name: (parts[name]["kind"] == "engine", name))
