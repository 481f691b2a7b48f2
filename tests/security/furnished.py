"""A tenant that has one of everything, with words that no other tenant may ever see."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import uuid4

from infra.clock import utcnow, uuid7
from protos.catalog import CHANNEL_OUTBOUND, USAGE_RECORDS
from protos.messages.billing import UsageRecorded
from protos.messages.channel import SendMessage
from tooling.testing.platform import Platform

CANARY = "Kormoranfelsen8315"
SPOKEN = "Eisvogelbucht4402"
"""In personal content only: what persons wrote, said or uploaded, and not in names of things."""
_NOWHERE = "http://127.0.0.1:9/"
_SECRET = "whsec_" + base64.b64encode(b"a secret of 24 bytes, ok").decode()


@dataclass(frozen=True)
class Furnished:
    id: str
    things: Mapping[str, str]
    """The part of a path before an id (``agents``) → the id of the tenant's thing."""
    views: Mapping[tuple[str, str], Any]
    """(service, path) → the tenant's view. Acts of others must not change it."""


async def asked(
    system: Platform, service: str, tenant: str, method: str, path: str, body: Any = None, **more: Any
) -> Any:
    """The JSON of the answer, which must be good. A busy machine gets five attempts: until then 503 says that a service
    behind this one did not answer in time."""
    async with system.client(service, tenant) as client:
        for _ in range(5):
            answer = await client.request(method, path, json=body, **more)
            if answer.status_code != 503:
                break
    assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
    return answer.json() if answer.content else None


async def dead_letter(system: Platform, tenant: str, person: str, text: str, *, seconds: float = 150) -> str:
    """The id of a dead letter with the text: a reply to a conversation that does not exist."""
    message = SendMessage(
        delivery_id=uuid7(),
        channel_id=uuid7(),
        session_key="none",
        conversation_id="none",
        text=text,
        subject_id=person,
    )
    await system.send(CHANNEL_OUTBOUND, message, tenant_id=tenant)

    async def stored() -> str | None:
        items = (await asked(system, "log_aggregator", tenant, "GET", "/api/v1/deadletters"))["items"]
        return items[0]["id"] if items else None

    return str(await system.until(stored, seconds=seconds))


async def furnish(system: Platform, word: str = CANARY, *, seconds: float = 150) -> Furnished:
    """A new tenant with one of everything. word: in all its things. seconds: the limit of each wait."""
    tenant = (await asked(system, "user", "", "POST", "/api/v1/tenants", {"name": word}))["id"]

    # First: a subscription must begin before the usage.
    billed = await _billed(system, tenant, word, seconds)

    async def make(service: str, path: str, body: Any = None, **more: Any) -> Any:
        return await asked(system, service, tenant, "POST", path, body, **more)

    member = await make("user", "/api/v1/members", {"email": f"{word}@example.com", "role": "admin", "name": word})
    key = await make("user", "/api/v1/api-keys", {"name": word})
    agent = await make("agent", "/api/v1/agents", {"name": word, "model": "scripted/answer", "system_prompt": word})
    run = await make(
        "agent", f"/api/v1/agents/{agent['id']}/sessions/s/messages", {"text": f"Who is {word}, {SPOKEN}?"}
    )
    credentials = {"secret": _SECRET, "reply_url": f"{_NOWHERE}{word}"}
    account = {"type": "webhook", "agent_id": agent["id"], "credentials": credentials}
    channel = await make("channel", "/api/v1/channels", account)
    words = {"conversation_id": word, "text": f"{word} {SPOKEN}"}
    delivery = await make("channel", f"/api/v1/channels/{channel['id']}/messages", words)
    file = {"file": (f"{word}.txt", f"{word} {SPOKEN}".encode(), "text/plain")}
    document = await make("memory", "/api/v1/documents", files=file)
    memory = await make("memory", "/api/v1/memories", {"text": f"I live in {word}, {SPOKEN}."})
    tool = {"name": f"fly_{word.casefold()}", "description": word, "schema": {"type": "object"}}
    server = {"name": word.casefold(), "kind": "http", "url": _NOWHERE, "tools": [tool]}
    plugin = await make("plugin", "/api/v1/plugins", server)
    endpoint = await make(
        "notification", "/api/v1/webhook-endpoints", {"url": f"{_NOWHERE}{word}", "events": ["run.completed"]}
    )
    letter = await dead_letter(system, tenant, "person-1", f"{word} {SPOKEN}", seconds=seconds)
    things = {
        "tenants": tenant,
        "members": member["id"],
        "api-keys": key["id"],
        "agents": agent["id"],
        "models": agent["id"],
        "runs": run["run_id"],
        "sessions": run["session_key"],
        "channels": channel["id"],
        "deliveries": delivery["delivery_id"],
        "messages": delivery["delivery_id"],
        "documents": document["id"],
        "memories": memory["id"],
        "plugins": plugin["id"],
        "webhook-endpoints": endpoint["id"],
        "deadletters": letter,
        "subjects": "person-1",
        "traces": uuid4().hex,
        # The payment provider does not answer, so none is saved.
        "payment-methods": str(uuid4()),
        **billed,
    }

    async def over() -> bool:
        found = await asked(system, "agent", tenant, "GET", f"/api/v1/runs/{run['run_id']}")
        return bool(found["status"] == "completed")

    await system.until(over, seconds=seconds)
    watched = [
        ("user", "/api/v1/members"),
        ("user", "/api/v1/api-keys"),
        ("agent", f"/api/v1/agents/{agent['id']}"),
        ("channel", f"/api/v1/channels/{channel['id']}"),
        ("memory", f"/api/v1/memories/{memory['id']}"),
        ("plugin", f"/api/v1/plugins/{plugin['id']}"),
        ("notification", f"/api/v1/webhook-endpoints/{endpoint['id']}"),
        ("billing", f"/api/v1/invoices/{things['invoices']}"),
        ("billing", "/api/v1/budgets"),
    ]
    views = {place: await asked(system, place[0], tenant, "GET", place[1]) for place in watched}
    return Furnished(tenant, things, views)


async def _billed(system: Platform, tenant: str, word: str, seconds: float) -> dict[str, str]:
    async def ask(method: str, path: str, body: Any = None, *, operator: bool = False) -> Any:
        return await asked(system, "billing", "" if operator else tenant, method, f"/api/v1/{path}", body)

    async def opened() -> bool:
        async with system.client("billing", tenant) as client:
            return (await client.get("/api/v1/billing/balance")).status_code == 200

    await system.until(opened, seconds=seconds)
    await ask("PUT", "billing/buyer", {"name": word, "country": "DE"})
    budget = await ask("POST", "budgets", {"scope": "tenant", "nanos": 10**12, "period": "month"})
    plan = await ask(
        "POST",
        "plans",
        {"name": str(uuid7()), "currency": "USD", "interval": "month", "base_nanos": 10**9},
        operator=True,
    )
    body = {"tenant_id": tenant, "plan_id": plan["id"], "starts_at": (utcnow() - timedelta(days=40)).isoformat()}
    subscription = await ask("POST", "subscriptions", body, operator=True)
    usage = str(uuid7())
    record = UsageRecorded(
        tenant_id=tenant,
        usage_id=usage,
        resource="openai/gpt-4o-mini",
        quantities={"input_tokens": 1000},
        occurred_at=utcnow(),
    )
    await system.produce(USAGE_RECORDS, record, key=tenant)
    await ask("POST", "billing/periods/close", {"tenant_id": tenant}, operator=True)
    # Not from the answer: billing's own clock may have closed the period a moment earlier.
    invoice = (await ask("GET", "invoices"))["items"][0]["id"]
    [line, *_] = (await ask("GET", f"invoices/{invoice}/lines"))["items"]
    payment = uuid7()
    async with system.database("billing").begin() as tx:
        await tx.sql(
            """
            INSERT INTO payment (tenant_id, payment_id, invoice_id, provider, amount_minor, currency)
            VALUES ($1, $2, $3, 'stripe', 100, 'USD')
            """,
            tenant,
            payment,
            invoice,
        )
        note = uuid7()
        await tx.sql(
            """
            INSERT INTO credit_note (tenant_id, credit_note_id, invoice_id, number, amount_minor, reason, actor)
            VALUES ($1, $2, $3, 'CN-000001', 1, 'an outage', 'operator')
            """,
            tenant,
            note,
            invoice,
        )
    return {
        "budgets": budget["id"],
        "credit-notes": str(note),
        "verdicts": usage,
        "held": usage,
        "subscriptions": subscription["id"],
        "invoices": invoice,
        "lines": line["id"],
        "payments": str(payment),
    }
