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


async def fail(services: Platform, service: str, tenant_id: str, subject: str = "s") -> str:
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
        error="ValueError: it was late",
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
    await fail(services, "user", "somebody else")
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


async def test_reading_a_dead_letter_is_audited(services: Platform, tenant: str) -> None:
    id_ = await fail(services, "user", tenant)
    async with services.client("log_aggregator", tenant, actor="member:m") as client:
        assert (await client.get(f"/api/v1/deadletters/{id_}")).status_code == 200
    async with services.client("log_aggregator", "") as client:
        assert (await client.get(f"/api/v1/deadletters/{id_}")).status_code == 200
    acts = [act for _, act in await services.outbox("log_aggregator", "audit.logs") if act["object_id"] == id_]
    assert [(act["actor"], act["action"], act["tenant_id"], act["details"]) for act in acts] == [
        ("member:m", "dead_letter.read", tenant, {"service": "user"}),
        ("operator", "dead_letter.read", None, {"service": "user"}),
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
