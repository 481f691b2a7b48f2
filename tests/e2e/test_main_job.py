"""A vendor's message is answered, delivered and billed, through the gateway, by a strict vendor and a strict model."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import httpx
import pytest

from tooling.testing.model_server import KEY, Fails, ModelServer, Says
from tooling.testing.system import Company as AnyCompany
from tooling.testing.system import System
from tooling.testing.until import until
from tooling.testing.vendors import SlackStandIn, TelegramStandIn, WebhookStandIn
from tooling.testing.vendors.server import StandIn

Vendor = SlackStandIn | TelegramStandIn | WebhookStandIn
TERMINAL = {"completed", "failed", "cancelled", "refused"}


class Company(AnyCompany):
    """A tenant with the calls of these tests."""

    async def agent(self, models: ModelServer | None = None, **more: Any) -> str:
        body: dict[str, Any] = {"name": "helper", "model": "scripted/answer", "system_prompt": "Be brief."}
        if models:
            body |= {"model": "openai/gpt-4o-mini", "provider": {"base_url": models.url, "api_key": KEY}}
        return str((await self.make("/api/v1/agents", {**body, **more}))["id"])

    async def channel(self, type_: str, agent: str, vendor: Vendor) -> str:
        """Makes a channel and returns its webhook path."""
        body: dict[str, Any] = {"type": type_, "agent_id": agent, "credentials": vendor.credentials}
        if type_ != "webhook":
            body["api_base"] = vendor.url
        return str((await self.make("/api/v1/channels", body))["webhook_path"])

    async def document(self, name: str, text: str) -> str:
        files = {"file": (name, text.encode(), "text/markdown")}
        answer = await self.api.post("/api/v1/documents", files=files)
        assert answer.status_code == 202, answer.text
        id_ = str(answer.json()["id"])

        async def indexed() -> bool:
            found = (await self.api.get(f"/api/v1/documents/{id_}")).json()
            assert found["status"] != "failed", found
            return bool(found["status"] == "indexed")

        await until(indexed)
        return id_

    async def runs(self, agent: str) -> list[dict[str, Any]]:
        answer = await self.api.get("/api/v1/runs", params={"agent_id": agent, "limit": 200})
        assert answer.status_code == 200, answer.text
        items: list[dict[str, Any]] = answer.json()["items"]
        return items

    async def ended(self, agent: str, count: int = 1) -> list[dict[str, Any]]:
        """The agent's runs, after `count` of them have ended."""

        async def enough() -> list[dict[str, Any]] | None:
            found = await self.runs(agent)
            return found if sum(run["status"] in TERMINAL for run in found) >= count else None

        return await until(enough)

    async def billed(self, run_id: str) -> dict[str, Any]:
        """The run, after its cost is known."""

        async def cost() -> dict[str, Any] | None:
            run: dict[str, Any] = (await self.api.get(f"/api/v1/runs/{run_id}")).json()
            return run if run["cost_nanos"] is not None else None

        return await until(cost)

    async def balanced(self) -> dict[str, Any]:
        """The reconciliation, after every produced record has a verdict."""

        async def found() -> dict[str, Any] | None:
            answer: dict[str, Any] = (await self.api.get("/api/v1/billing/reconciliation")).json()
            done = answer["counted"] + answer["duplicate"] + answer["rejected"] + answer["held"]
            return answer if answer["produced"] == done and answer["produced"] else None

        return await until(found)


@pytest.fixture
async def company(system: System) -> AsyncIterator[Company]:
    async with system.client(await system.tenant("Norrland", credit_nanos=10_000_000_000)) as api:
        yield Company(api)


async def sent(system: System, path: str, update: tuple[bytes, dict[str, str]]) -> int:
    body, headers = update
    async with system.client() as vendor:
        return (await vendor.post(path, content=body, headers=headers)).status_code


async def test_a_message_is_answered_from_a_document_delivered_billed_audited_and_told(
    system: System, company: Company, models: ModelServer
) -> None:
    agent = await company.agent(models, knowledge=True, tools=["calculator"])
    document = await company.document("care.md", "# Care\n\nThe boiler is descaled every 77 days with liquid 7710.\n")
    models.script(
        "gpt-4o-mini",
        Says(calls=(("calculator", '{"expression": "77*2"}'),), usage=(200, 50, 12, 0)),
        Says("Every 77 days; twice that is 154.", usage=(260, 0, 9, 0)),
    )
    asked = len(models.asked("gpt-4o-mini"))
    async with TelegramStandIn() as vendor:
        path = await company.channel("telegram", agent, vendor)
        assert await sent(system, path, vendor.update("How often is the boiler descaled, and twice that?")) == 200
        [run] = await company.ended(agent)
        await until(lambda: _has(vendor, 1))
        assert vendor.texts() == ["Every 77 days; twice that is 154."]
        assert vendor.refusals == []
    first, second = models.asked("gpt-4o-mini")[asked:]
    assert first.last_user_text == second.last_user_text == "How often is the boiler descaled, and twice that?"
    assert "7710" in first.system
    assert "care.md" in first.system
    assert any(message["role"] == "tool" and "154" in message["content"] for message in second.body["messages"])
    assert models.refused == []

    run = await company.billed(run["id"])
    assert (run["status"], run["reply"]) == ("completed", "Every 77 days; twice that is 154.")
    assert run["usage"] == {"input_tokens": 460, "cached_tokens": 50, "output_tokens": 21}
    assert [step["kind"] for step in run["steps"]] == ["retrieve", "model", "tool", "model"]
    assert {step["status"] for step in run["steps"]} == {"completed"}
    # gpt-4o-mini: 0.15 and 0.60 USD for a million tokens in and out, cached ones at 0.075.
    models_cost = (460 - 50) * 150 + 50 * 75 + 21 * 600
    timeline = (await company.api.get(f"/api/v1/runs/{run['id']}/timeline")).json()["items"]
    charges = [item for item in timeline if item["kind"] == "charge"]
    assert sum(item["data"]["amount_nanos"] for item in charges) == run["cost_nanos"] >= models_cost
    assert sum(i["data"]["amount_nanos"] for i in charges if "gpt-4o-mini" in i["data"]["resource"]) == models_cost
    kinds = [item["kind"] for item in timeline]
    assert kinds[0] == "inbound"
    assert {"inbound", "queued", "retrieve", "model", "tool", "reply", "delivery", "usage", "charge"} <= set(kinds)
    sources = [p["source"] for i in timeline if i["kind"] == "retrieve" for p in i["data"]["passages"]]
    assert {source["document_id"] for source in sources} == {document}
    assert [item["at"] for item in timeline] == sorted(item["at"] for item in timeline)

    balance = await company.balanced()
    assert balance["difference"] == 0
    ledger = (await company.api.get("/api/v1/billing/ledger", params={"limit": 200})).json()["items"]
    assert ledger
    audit = await until(lambda: _audited(company))
    assert audit["ok"]


async def test_the_same_webhook_twice_is_one_run_one_reply_and_one_charge(system: System, company: Company) -> None:
    agent = await company.agent()
    async with TelegramStandIn() as vendor:
        path = await company.channel("telegram", agent, vendor)
        update = vendor.update("What is 6 * 7?")
        assert set(await asyncio.gather(*(sent(system, path, update) for _ in range(5)))) == {200}
        [run] = await company.ended(agent)
        await company.billed(run["id"])
        # A later message of the same conversation: after its answer no repeat can be in flight.
        assert await sent(system, path, vendor.update("And hello?")) == 200
        await until(lambda: _has(vendor, 2))
        assert len(await company.runs(agent)) == 2
        assert len(vendor.ledger) == 2


@pytest.mark.parametrize("forgery", ["wrong secret", "no secret", "unknown path"])
async def test_what_is_not_the_vendors_changes_nothing(system: System, company: Company, forgery: str) -> None:
    agent = await company.agent()
    async with TelegramStandIn() as vendor:
        path = await company.channel("telegram", agent, vendor)
        body, headers = vendor.update("hi")
        name = next(name for name in headers if "secret" in name)
        match forgery:
            case "wrong secret":
                status = await sent(system, path, (body, headers | {name: "x" * 24}))
            case "no secret":
                status = await sent(system, path, (body, {k: v for k, v in headers.items() if k != name}))
            case _:
                status = await sent(system, path[:-4] + "AAAA", (body, headers))
        assert status == (404 if forgery == "unknown path" else 401)
        assert await sent(system, path, vendor.update("hello")) == 200
        await until(lambda: _has(vendor, 1))
        assert len(await company.runs(agent)) == 1


async def test_slack_and_standard_webhooks_are_answered_too(system: System, company: Company) -> None:
    agent = await company.agent()
    async with SlackStandIn() as slack, WebhookStandIn() as hook:
        slack_path = await company.channel("slack", agent, slack)
        hook_path = await company.channel("webhook", agent, hook)
        assert await sent(system, slack_path, slack.event("hello there", channel="C7")) == 200
        assert await sent(system, hook_path, hook.message("hello there", conversation="c-1")) == 200
        await until(lambda: _has(slack, 1))
        await until(lambda: _has(hook, 1))
        assert [message.to for message in slack.ledger] == ["C7"]
        assert [message.to for message in hook.ledger] == ["c-1"]
        assert slack.refusals == hook.refusals == []


async def test_a_model_that_is_busy_is_asked_again_and_the_reply_comes_once(
    system: System, company: Company, models: ModelServer
) -> None:
    agent = await company.agent(models)
    models.script("gpt-4o-mini", Fails(429, retry_after=1), Fails(500), Says("Here I am."))
    async with TelegramStandIn() as vendor:
        path = await company.channel("telegram", agent, vendor)
        assert await sent(system, path, vendor.update("are you there?")) == 200
        [run] = await company.ended(agent)
        await until(lambda: _has(vendor, 1))
        assert (run["status"], vendor.texts()) == ("completed", ["Here I am."])


async def test_a_tenant_without_credit_is_told_so_and_nothing_is_lost(system: System) -> None:
    async with system.client(await system.tenant("Poor", credit_nanos=1)) as api, TelegramStandIn() as vendor:
        poor = Company(api)
        agent = await poor.agent()
        path = await poor.channel("telegram", agent, vendor)
        assert await sent(system, path, vendor.update("hello?")) == 200
        [run] = await poor.ended(agent)
        await until(lambda: _has(vendor, 1))
        assert run["status"] == "refused"
        assert run["error"]
        assert vendor.texts()[0]


async def test_another_tenant_sees_nothing_of_it(system: System, company: Company) -> None:
    agent = await company.agent()
    document = await company.document("secret.md", "# Secret\n\nThe vault's number is 4711.\n")
    answer = await company.api.post(f"/api/v1/agents/{agent}/sessions/s/messages", json={"text": "hello"})
    run_id = answer.json()["run_id"]
    await company.ended(agent)
    async with system.client(await system.tenant("Other")) as other:
        for path in (f"agents/{agent}", f"runs/{run_id}", f"runs/{run_id}/timeline", f"documents/{document}"):
            assert (await other.get(f"/api/v1/{path}")).status_code == 404, path
        assert (await other.get(f"/api/v1/runs/{run_id}/events")).status_code == 404
        found = await other.post("/api/v1/memory/search", json={"query": "the vault's number", "min_similarity": -1})
        assert found.json()["items"] == []
        own = await company.api.post("/api/v1/memory/search", json={"query": "the vault's number"})
        assert own.json()["items"][0]["source"]["document_id"] == document
    async with system.client() as nobody:
        assert (await nobody.get(f"/api/v1/runs/{run_id}")).status_code == 401


async def test_the_run_can_be_watched_and_watched_again_from_any_event(system: System, company: Company) -> None:
    agent = await company.agent()
    answer = await company.api.post(f"/api/v1/agents/{agent}/sessions/watch/messages", json={"text": "hello"})
    run_id = answer.json()["run_id"]
    names, ids = await watched(company.api, run_id)
    assert names[0] == "run.started"
    assert names[-2:] == ["reply", "run.completed"]
    assert ids == sorted(set(ids))
    again, later = await watched(company.api, run_id, after=ids[1])
    assert again[-1] == "run.completed"
    assert later == ids[2:]


async def test_one_trace_shows_the_way_from_the_webhook_to_the_vendor_and_the_charge(
    system: System, company: Company
) -> None:
    agent = await company.agent(knowledge=True)
    await company.document("a.md", "# A\n\nThe lamp is green when the machine is ready.\n")
    async with TelegramStandIn() as vendor:
        path = await company.channel("telegram", agent, vendor)
        assert await sent(system, path, vendor.update("What colour is the lamp when ready?")) == 200
        [run] = await company.ended(agent)
        await until(lambda: _has(vendor, 1))
        await company.billed(run["id"])

    async def spans() -> list[dict[str, Any]] | None:
        found: list[dict[str, Any]] = (await company.api.get(f"/api/v1/traces/{run['trace_id']}")).json()["items"]
        mine = [span for span in found if span["trace_id"] == run["trace_id"]]
        present = {(span["service"], span["kind"]) for span in mine}
        wanted = {("channel", "server"), ("agent", "consumer"), ("memory", "server"), ("billing", "server")}
        charged = any(span["service"] == "billing" and "charge" in span["name"] for span in mine)
        vendor_called = any(span["service"] == "channel" and span["kind"] == "client" for span in mine)
        # A service exports its spans in batches, so a parent can arrive after its children.
        complete = len(roots(mine)) == 1
        return mine if wanted <= present and charged and vendor_called and complete else None

    [root] = roots(await until(spans))
    assert (root["service"], root["kind"]) == ("channel", "server")
    assert root["name"].startswith("POST ")

    async def logged() -> bool:
        async with system.client(system.admin_token) as operator:
            found = (await operator.get("/api/v1/logs", params={"trace_id": run["trace_id"]})).json()["items"]
        return {"agent", "channel"} <= {line["service"] for line in found}

    await until(logged)

    async def told() -> bool:
        """The tenant finds what happened to its run and in its channel."""
        of_run = (await company.get("/api/v1/logs", run_id=run["id"]))["items"]
        [channel] = (await company.get("/api/v1/channels"))["items"]
        of_channel = (await company.get("/api/v1/logs", channel_id=channel["id"]))["items"]
        texts = [{line["message"] for line in lines} for lines in (of_run, of_channel)]
        return all({"run completed", "reply delivered"} <= found for found in texts)

    await until(told)


async def test_a_failed_run_is_found_among_the_errors(company: Company, models: ModelServer) -> None:
    models.script("gpt-4o-mini", Fails(400))
    agent = await company.agent(models)
    await company.api.post(f"/api/v1/agents/{agent}/sessions/s/messages", json={"text": "hello"})
    [run] = await company.ended(agent)
    assert run["status"] == "failed"

    async def found() -> bool:
        lines = (await company.get("/api/v1/logs", search="errors", run_id=run["id"]))["items"]
        return "run failed" in {line["message"] for line in lines}

    await until(found)


async def test_fifty_conversations_of_five_tenants_hear_only_their_own_and_in_order(
    system: System, models: ModelServer
) -> None:
    rounds, chats = 3, range(1001, 1011)
    async with AsyncExitStack() as stack:
        places: dict[str, tuple[str, TelegramStandIn]] = {}
        for name in ("red", "green", "blue", "black", "white"):
            company = Company(await stack.enter_async_context(system.client(await system.tenant(name))))
            vendor = await stack.enter_async_context(TelegramStandIn())
            agent = await company.agent(models, queue_mode="followup")
            places[name] = await company.channel("telegram", agent, vendor), vendor
        for n in range(rounds):
            answers = await asyncio.gather(
                *(
                    sent(system, path, vendor.update(f"canary {name}-{chat}-{n}", chat=chat, person=chat))
                    for name, (path, vendor) in places.items()
                    for chat in chats
                )
            )
            assert set(answers) == {200}
        for _, vendor in places.values():
            await until(partial(_has, vendor, rounds * len(chats)))
        for name, (_, vendor) in places.items():
            for chat in chats:
                own = [f"You said: canary {name}-{chat}-{n}" for n in range(rounds)]
                assert vendor.texts(str(chat)) == own
            assert len(vendor.ledger) == rounds * len(chats)
    for request in models.requests:
        if canaries := set(re.findall(r"canary (\w+-\d+)-\d", json.dumps(request.body))):
            assert len(canaries) == 1, canaries


def roots(spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Spans whose parent is not in `spans`."""
    ids = {span["span_id"] for span in spans}
    return [span for span in spans if span["parent_id"] not in ids]


async def _has(vendor: StandIn, count: int) -> bool:
    return len(vendor.ledger) >= count


async def _audited(company: Company) -> dict[str, Any] | None:
    found: dict[str, Any] = (await company.api.get("/api/v1/audit/verify")).json()
    # At least the agent, the channel and the document.
    return found if found["records"] >= 3 else None


async def watched(api: httpx.AsyncClient, run_id: str, after: int | None = None) -> tuple[list[str], list[int]]:
    """Names of all events except deltas, and the ids, to the end of the stream."""
    names, ids = [], []
    headers = {"accept": "text/event-stream", **({"last-event-id": str(after)} if after is not None else {})}
    async with api.stream("GET", f"/api/v1/runs/{run_id}/events", headers=headers, timeout=60) as stream:
        assert stream.status_code == 200
        async for line in stream.aiter_lines():
            field, _, value = line.partition(": ")
            if field == "event" and value != "delta":
                names.append(value)
            elif field == "id":
                ids.append(int(value))
    return names, ids
