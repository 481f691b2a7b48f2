"""Tenants' webhook endpoints: from a public fact to a call that the judge accepts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
from standardwebhooks import Webhook as Judge

from infra.clock import utcnow, uuid7
from infra.lanes.processor import MAX_RECOVERIES
from protos.catalog import AGENT_EVENTS, CHANNEL_EVENTS
from protos.envelope import Message
from protos.messages.agent import RunCompleted, RunFailed, RunStarted
from protos.messages.channel import MessageUndelivered
from services.notification.retention import Retention
from services.notification.webhooks.endpoints import RETRIES, enqueue
from services.notification.webhooks.events import EVENT_TYPES
from tests.services.notification.conftest import World, address
from tooling.testing.vendors import answer
from tooling.testing.vendors.server import Call, Fault, Reply, StandIn

PATH = "/api/v1/webhook-endpoints"


class Receiver(StandIn):
    """A tenant's program that gets webhooks."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[Call] = []

    def handle(self, call: Call) -> Reply:
        self.received.append(call)
        return Reply(204, None)

    def events(self, *secrets: str) -> list[dict[str, Any]]:
        """The received events. Each call has a signature with each of the secrets."""
        found = []
        for call in self.received:
            for secret in secrets:
                found.append(Judge(secret).verify(call.body, dict(call.headers)))
        return found


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as running:
        yield running


class Tenant:
    def __init__(self, world: World) -> None:
        self.world = world
        self.id = uuid4().hex

    async def call(self, method: str, path: str = "", *, expect: int = 200, **given: Any) -> Any:
        async with self.world.platform.client("notification", self.id) as http:
            response = await http.request(method, PATH + path, **given)
        assert response.status_code == expect, response.text
        return response.json() if response.content else None

    async def connect(self, receiver: Receiver, *events: str) -> dict[str, Any]:
        body = {"url": f"{receiver.url}/hooks", "events": events or ["run.completed"]}
        made: dict[str, Any] = await self.call("POST", expect=201, json=body)
        return made

    async def publish(self, message: Message, *, message_id: UUID | None = None) -> UUID:
        topic = CHANNEL_EVENTS if isinstance(message, MessageUndelivered) else AGENT_EVENTS
        return await self.world.platform.produce(
            topic, message, key=self.id, tenant_id=self.id, message_id=message_id or uuid7()
        )

    async def log(self, endpoint: dict[str, Any]) -> list[dict[str, Any]]:
        """Oldest first."""
        items: list[dict[str, Any]] = (await self.call("GET", f"/{endpoint['id']}/deliveries"))["items"]
        return items[::-1]

    async def tried(self, endpoint: dict[str, Any], attempts: int) -> None:
        """Waits until the only delivery has had so many attempts."""

        async def ask() -> bool:
            return [one["attempts"] for one in await self.log(endpoint)] == [attempts]

        await self.world.platform.until(ask)

    async def ended(self, endpoint: dict[str, Any], count: int = 1) -> list[dict[str, Any]]:
        async def ask() -> list[dict[str, Any]] | None:
            found = await self.log(endpoint)
            return found if len(found) == count and all(one["state"] != "waiting" for one in found) else None

        found = await self.world.platform.until(ask)
        assert found
        return found

    async def hurry(self) -> None:
        """The next attempts are due now."""
        await self.world.sql("UPDATE lane_item SET not_before = now() WHERE kind = 'webhooks' AND state = 'waiting'")
        await self.world.sql("UPDATE lane SET ready_at = now() WHERE kind = 'webhooks' AND ready_at IS NOT NULL")


@pytest.fixture
def tenant(world: World) -> Tenant:
    return Tenant(world)


def completed(reply: str = "secret words") -> RunCompleted:
    return RunCompleted(run_id=uuid7(), session_key="s", reply=reply)


async def test_an_endpoint_gets_the_events_that_it_asked_for_signed_and_without_content(
    tenant: Tenant, receiver: Receiver
) -> None:
    endpoint = await tenant.connect(receiver, "run.completed", "run.cancelled", "message.failed")
    run = completed()
    await tenant.publish(RunStarted(run_id=run.run_id, session_key="s", agent_id=uuid7(), attempt=1))
    id_ = await tenant.publish(run)
    await tenant.publish(run, message_id=id_)
    await tenant.publish(RunFailed(run_id=run.run_id, session_key="s", status="cancelled", error="why"))
    await tenant.publish(RunFailed(run_id=run.run_id, session_key="s", status="failed", error="why"))
    lost = MessageUndelivered(
        delivery_id=uuid7(), channel_id=uuid7(), session_key="s", run_id=None, outcome="unknown", reason="no answer"
    )
    await tenant.publish(lost)
    log = await tenant.ended(endpoint, 3)
    assert {(one["type"], one["state"], one["attempts"], one["status"]) for one in log} == {
        (type_, "delivered", 1, 204) for type_ in ("run.completed", "run.cancelled", "message.failed")
    }
    events = {event["type"]: event for event in receiver.events(endpoint["secret"])}
    assert len(receiver.received) == 3
    assert events["run.completed"]["data"] == {
        "run_id": str(run.run_id),
        "session_key": "s",
        "finish_reason": "stop",
    }
    assert events["message.failed"]["data"]["outcome"] == "unknown"
    assert {call.headers["webhook-id"] for call in receiver.received} == {one["webhook_id"] for one in log}
    assert not any(b"secret words" in call.body for call in receiver.received)


async def test_another_tenants_events_stay_there(world: World, tenant: Tenant, receiver: Receiver) -> None:
    endpoint, other = await tenant.connect(receiver), Tenant(world)
    await other.publish(completed())
    run = completed()
    await tenant.publish(run)
    await tenant.ended(endpoint)
    assert [event["data"]["run_id"] for event in receiver.events(endpoint["secret"])] == [str(run.run_id)]
    for method, path in (
        ("GET", ""),
        ("PATCH", ""),
        ("DELETE", ""),
        ("GET", "/deliveries"),
        ("POST", "/rotate-secret"),
    ):
        await other.call(method, f"/{endpoint['id']}{path}", expect=404, json={} if method != "GET" else None)
    await other.call("POST", f"/{endpoint['id']}/resend", expect=404, json={"since": utcnow().isoformat()})
    assert (await other.call("GET"))["items"] == []


async def test_a_failed_call_is_repeated_with_the_same_id_until_it_is_accepted(
    tenant: Tenant, receiver: Receiver
) -> None:
    endpoint = await tenant.connect(receiver)
    receiver.faults += [answer(500), answer(302)]
    await tenant.publish(completed())
    for calls in (1, 2):
        await tenant.tried(endpoint, calls)
        [waiting] = await tenant.log(endpoint)
        assert (waiting["state"], waiting["status"]) == ("waiting", (500, 302)[calls - 1])
        assert (await tenant.call("GET", f"/{endpoint['id']}"))["failing_since"]
        await tenant.hurry()
    [log] = await tenant.ended(endpoint)
    assert (log["state"], log["attempts"], receiver.calls) == ("delivered", 3, 3)
    assert (await tenant.call("GET", f"/{endpoint['id']}"))["failing_since"] is None


@pytest.mark.parametrize(("path", "state"), [("/200", "delivered"), ("/302", "failed")])
async def test_the_body_of_an_answer_does_not_matter(world: World, tenant: Tenant, path: str, state: str) -> None:
    """A page larger than the limit: only the status says if the event was accepted. Redirects are not followed."""

    class Pages(Receiver):
        def handle(self, call: Call) -> Reply:
            self.received.append(call)
            return Reply(int(call.path[-3:]), {"page": "x" * 100_000}, {"location": f"{self.url}/200"})

    async with Pages() as pages:
        made = await tenant.call("POST", expect=201, json={"url": pages.url + path, "events": ["run.completed"]})
        await tenant.publish(completed())
        if state == "failed":
            await tenant.tried(made, 1)
        else:
            await tenant.ended(made)
        [delivery] = await tenant.log(made)
        assert (delivery["status"], delivery["error"]) == (int(path[1:]), None if state == "delivered" else "HTTP 302")
        assert [call.path for call in pages.received] == [path]


def test_the_retries_are_those_of_standard_webhooks() -> None:
    assert [delay.total_seconds() for delay in RETRIES] == [5, 300, 1_800, 7_200, 18_000, 36_000, 36_000]


async def test_after_the_last_attempt_the_event_has_failed_and_can_be_sent_again(
    tenant: Tenant, receiver: Receiver
) -> None:
    endpoint = await tenant.connect(receiver)
    receiver.faults.append(answer(500))
    before = utcnow()
    await tenant.publish(completed())
    await tenant.tried(endpoint, 1)
    await tenant.world.sql("UPDATE webhook_delivery SET attempts = $1 WHERE endpoint_id = $2", 7, UUID(endpoint["id"]))
    receiver.faults.append(answer(500))
    await tenant.hurry()
    [log] = await tenant.ended(endpoint)
    assert (log["state"], log["attempts"], log["error"]) == ("failed", 8, "HTTP 500")
    after = (utcnow() + timedelta(hours=1)).isoformat()
    assert (await tenant.call("POST", f"/{endpoint['id']}/resend", expect=202, json={"since": after}))["resent"] == 0
    resent = await tenant.call("POST", f"/{endpoint['id']}/resend", expect=202, json={"since": before.isoformat()})
    assert resent == {"resent": 1, "next": None}
    [log] = await tenant.ended(endpoint)
    assert (log["state"], log["attempts"]) == ("delivered", 1)
    [call] = receiver.received
    assert call.headers["webhook-id"] == log["webhook_id"]


async def test_a_delivery_whose_item_became_a_dead_letter_has_failed_and_can_be_sent_again(
    tenant: Tenant, receiver: Receiver
) -> None:
    endpoint = await tenant.connect(receiver)
    receiver.faults.append(answer(500))
    before = utcnow()
    await tenant.publish(completed())
    await tenant.tried(endpoint, 1)
    await tenant.world.sql("UPDATE lane_item SET recoveries = $1 WHERE tenant_id = $2", MAX_RECOVERIES, tenant.id)
    await tenant.hurry()
    [log] = await tenant.ended(endpoint)
    assert (log["state"], log["attempts"], log["error"]) == ("failed", 1, "an internal error")
    # As a redrive of the dead letter does it.
    async with tenant.world.platform.database("notification").begin(tenant_id=tenant.id) as tx:
        enqueue(tx, UUID(log["id"]))

    async def delivered() -> list[dict[str, Any]]:
        return [one for one in await tenant.log(endpoint) if one["state"] == "delivered"]

    assert await tenant.world.platform.until(delivered)
    await tenant.call("POST", f"/{endpoint['id']}/resend", expect=202, json={"since": before.isoformat()})
    await tenant.ended(endpoint)
    assert len(receiver.received) == 2


async def test_an_answer_410_disables_the_endpoint_and_the_owners_are_told(
    world: World, tenant: Tenant, receiver: Receiver
) -> None:
    owner = address()
    world.directory.owners[tenant.id] = [owner]
    endpoint = await tenant.connect(receiver)
    receiver.faults.append(answer(410))
    await tenant.publish(completed())
    [log] = await tenant.ended(endpoint)
    assert (log["state"], log["status"]) == ("failed", 410)
    found = await tenant.call("GET", f"/{endpoint['id']}")
    assert (found["enabled"], found["disabled_reason"]) == (False, "it answered 410")
    await tenant.call("POST", f"/{endpoint['id']}/resend", expect=409, json={"since": utcnow().isoformat()})

    async def told() -> bool:
        return any("410" in mail.get_content() for mail in world.inbox.of(owner))

    await world.platform.until(told)
    assert (await tenant.call("PATCH", f"/{endpoint['id']}", json={"enabled": True}))["enabled"]
    await tenant.publish(completed())
    assert [one["state"] for one in await tenant.ended(endpoint, 2)] == ["failed", "delivered"]


async def test_answers_of_the_former_address_do_not_count_after_a_change(
    world: World, tenant: Tenant, receiver: Receiver
) -> None:
    endpoint = await tenant.connect(receiver)
    receiver.faults.append(answer(500))
    await tenant.publish(completed())
    await tenant.tried(endpoint, 1)
    asked = asyncio.Event()
    receiver.faults.append(Fault(Reply(410, None), wait=asked))
    await tenant.hurry()

    async def called() -> bool:
        return receiver.calls == 2

    await world.platform.until(called)
    changed = await tenant.call("PATCH", f"/{endpoint['id']}", json={"url": f"{receiver.url}/new"})
    assert changed["failing_since"] is None
    asked.set()
    [log] = await tenant.ended(endpoint)
    assert (log["state"], log["status"]) == ("failed", 410)
    found = await tenant.call("GET", f"/{endpoint['id']}")
    assert (found["enabled"], found["failing_since"]) == (True, None)


async def test_five_days_of_failures_disable_the_endpoint(world: World, tenant: Tenant, receiver: Receiver) -> None:
    endpoint = await tenant.connect(receiver)
    for days, enabled in ((4, True), (6, False)):
        await world.sql(
            "UPDATE webhook_endpoint SET failing_since = now() - make_interval(days => $1) WHERE id = $2",
            days,
            UUID(endpoint["id"]),
        )
        receiver.faults.append(answer(500))
        await tenant.publish(completed())

        async def tried(enabled: bool = enabled) -> bool:
            found = await tenant.call("GET", f"/{endpoint['id']}")
            # Each attempt is recorded before the time of the first failure is changed again.
            recorded = sum(one["attempts"] for one in await tenant.log(endpoint))
            return bool(recorded >= (1 if enabled else 2) and found["enabled"] == enabled)

        await world.platform.until(tried)
    found = await tenant.call("GET", f"/{endpoint['id']}")
    assert found["disabled_reason"] == "it has accepted nothing for 5 days"


async def test_what_is_old_is_deleted_also_of_a_tenant_without_new_events(
    world: World, tenant: Tenant, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.notification.retention.BATCH", 2)
    endpoint = UUID((await tenant.connect(receiver))["id"])
    await world.sql(
        """
        INSERT INTO webhook_delivery (id, endpoint_id, tenant_id, message_id, type, body, state, created_at)
        SELECT gen_random_uuid(), $1, $2, gen_random_uuid(), 'run.completed', '', state,
            now() - make_interval(days => days)
        FROM unnest('{delivered,failed,delivered,failed,waiting,delivered}'::text[], '{31,31,31,32,31,29}'::int[])
            AS n(state, days)
        """,
        endpoint,
        tenant.id,
    )
    await world.sql(
        """
        INSERT INTO notification (tenant_id, id, kind, state, finished_at, created_at)
        SELECT $1, gen_random_uuid(), 'email', 'sent', now(), now() - make_interval(days => days)
        FROM unnest('{91,92,93,89}'::int[]) AS n(days)
        """,
        tenant.id,
    )
    await Retention(world.platform.database("notification")).tick()
    kept = await world.sql("SELECT state FROM webhook_delivery WHERE tenant_id = $1 ORDER BY state", tenant.id)
    assert [state for (state,) in kept] == ["delivered", "waiting"]
    assert len((await world.listed(tenant.id))["items"]) == 1


async def test_both_secrets_sign_during_a_rotation(world: World, tenant: Tenant, receiver: Receiver) -> None:
    endpoint = await tenant.connect(receiver)
    rotated = await tenant.call("POST", f"/{endpoint['id']}/rotate-secret")
    await tenant.publish(completed())
    await tenant.ended(endpoint)
    assert len(receiver.events(endpoint["secret"], rotated["secret"])) == 2
    await world.sql("UPDATE webhook_endpoint SET old_until = now() WHERE id = $1", UUID(endpoint["id"]))
    receiver.received.clear()
    await tenant.publish(completed())
    await tenant.ended(endpoint, 2)
    assert receiver.events(rotated["secret"])
    with pytest.raises(Exception, match="signature"):
        receiver.events(endpoint["secret"])


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"url": "http://169.254.169.254/x", "events": ["run.completed"]}, "url"),
        ({"url": "ftp://example.com", "events": ["run.completed"]}, "url"),
        ({"url": "", "events": ["run.completed"]}, "url"),
        ({"url": "http://127.0.0.1:9", "events": []}, "events"),
        ({"url": "http://127.0.0.1:9", "events": ["run.exploded"]}, "events[0]"),
        ({"url": "http://127.0.0.1:9", "events": ["run.completed"], "x": 1}, "x"),
    ],
)
async def test_a_bad_endpoint_is_refused(tenant: Tenant, body: dict[str, Any], field: str) -> None:
    refused = await tenant.call("POST", expect=422, json=body)
    assert refused["errors"][0]["field"] == field
    assert (await tenant.call("GET"))["items"] == []


async def test_the_secret_is_shown_once_and_a_tenant_has_at_most_twenty_endpoints(
    tenant: Tenant, receiver: Receiver
) -> None:
    given: dict[str, Any] = {
        "json": {"url": receiver.url, "events": list(EVENT_TYPES)},
        "headers": {"idempotency-key": "k"},
    }
    first, again = [await tenant.call("POST", expect=201, **given) for _ in range(2)]
    assert first["id"] == again["id"]
    assert len(first["secret"]) == len("whsec_") + 44
    assert first["secret"] not in msgspec.json.encode(again).decode()
    for _ in range(18):
        await tenant.connect(receiver)
    # One place is left, and both wait for their turn.
    platform = tenant.world.platform
    async with platform.client("notification", tenant.id) as http:
        async with platform.database("notification").begin() as tx:
            await tx.take_turn(f"webhook endpoints {tenant.id}")
            asked = [asyncio.create_task(http.post(PATH, json=given["json"])) for _ in range(2)]

            async def both_wait() -> bool:
                waiting = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
                return any(one.done() for one in asked) or len(await tx.sql(waiting)) >= len(asked)

            await platform.until(both_wait)
            assert not any(one.done() for one in asked)
        answers = await asyncio.gather(*asked)
    assert sorted(answer.status_code for answer in answers) == [201, 409]
    listed = await tenant.call("GET", params={"limit": 15})
    rest = await tenant.call("GET", params={"limit": 15, "cursor": listed["next"]})
    assert (len(listed["items"]), len(rest["items"]), rest["next"]) == (15, 5, None)
    assert not any("secret" in one for one in listed["items"])
    await tenant.call("DELETE", f"/{first['id']}", expect=204)
