"""The real process calls a tool once per key, and every behaviour of the tool leads to an outcome."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest

from infra.clock import uuid7
from infra.errors import InvalidMessage, NotFound, Transient
from tests.services.plugin.conftest import CallReply, call, register, tool
from tests.services.plugin.toolserver import ToolServer
from tooling.testing.platform import Platform

SHOP = (
    tool("order", item={"type": "string"}, count={"type": "integer"}),
    tool("slow"),
    tool("slow_once", "once"),
    tool("huge"),
    tool("silent", "repeatable"),
    tool("silent_order", "once"),
    tool("refusing"),
    tool("talkative"),
    tool("busy"),
)


@pytest.fixture(scope="module")
async def shop(plugin: Platform, server: ToolServer) -> Platform:
    await register(plugin, "acme", server, *SHOP, headers={"x-shop": "north"}, config={"currency": "EUR"})
    return plugin


async def usage(platform: Platform, key: str) -> list[str]:
    records = [body for _, body in await platform.outbox("plugin", "usage.records")]
    assert all(record["tenant_id"] == "acme" and record["quantities"] == {"calls": 1} for record in records)
    return sorted(record["usage_id"] for record in records if record["usage_id"].startswith(key))


async def test_a_call_is_signed_run_once_and_billed_once(shop: Platform, server: ToolServer) -> None:
    arguments = '{"item": "lamp", "count": 2}'
    replies = [await call(shop, "acme", "order", arguments, key="run-1/3") for _ in range(3)]
    assert replies[0].outcome == CallReply.OUTCOME_SUCCEEDED
    assert json.loads(replies[0].result_json) == {
        "did": {"item": "lamp", "count": 2},
        "config": {"currency": "EUR"},
    }
    assert replies[1:] == replies[:1] * 2
    assert server.ids("order").count("run-1/3") == 1
    assert server.headers[-1]["x-shop"] == "north"
    assert await usage(shop, "run-1/3") == ["run-1/3/tool/1"]
    # The answer of a tool may contain personal data, so it is stored sealed.
    async with shop.database("plugin").begin() as tx:
        [(stored,)] = await tx.sql("SELECT outcome FROM tool_call WHERE key = 'run-1/3'")
    assert b"lamp" not in stored


async def test_the_usage_record_names_the_hold_the_run_and_the_scopes_of_budgets_and_reports(shop: Platform) -> None:
    names = ("hold_id", "agent_id", "channel_id", "api_key_id", "member_id", "run_id")
    given: dict[str, Any] = {name: str(uuid7()) for name in names} | {"session_key": "the session", "tag": "support"}
    await call(shop, "acme", "order", '{"item": "lamp"}', key="held", **given)
    [record] = [body for _, body in await shop.outbox("plugin", "usage.records") if body["usage_id"] == "held/tool/1"]
    assert {name: record[name] for name in given} == given
    with pytest.raises(InvalidMessage, match="hold_id: must be a UUID"):
        await call(shop, "acme", "order", key="odd", hold_id="x")


async def test_the_key_of_another_call_is_refused(shop: Platform) -> None:
    await call(shop, "acme", "order", '{"item": "lamp"}', key="taken")
    for other in (("order", '{"item": "sofa"}'), ("busy", "{}")):
        with pytest.raises(InvalidMessage) as refused:
            await call(shop, "acme", *other, key="taken")
        assert refused.value.field == "idempotency_key"


async def test_arguments_that_do_not_fit_never_reach_the_tool(shop: Platform, server: ToolServer) -> None:
    for arguments, field in (
        ('{"count": "two"}', "arguments.count"),
        ('{"colour": "red"}', "arguments.colour"),
        ("[1]", "arguments"),
        ("{", "arguments"),
    ):
        with pytest.raises(InvalidMessage) as refused:
            await call(shop, "acme", "order", arguments, key="bad")
        assert refused.value.field == field
    with pytest.raises(InvalidMessage):
        await call(shop, "acme", "order", key="no.stop")
    assert "bad" not in server.ids("order")


async def test_of_calls_at_once_with_one_key_one_runs_and_all_have_its_answer(
    shop: Platform, server: ToolServer
) -> None:
    server.hold.clear()
    calls = [asyncio.create_task(call(shop, "acme", "slow", key="at-once")) for _ in range(5)]
    await server.arrived("at-once")
    server.hold.set()
    replies = await asyncio.gather(*calls)
    assert Counter(reply.outcome for reply in replies) == {CallReply.OUTCOME_SUCCEEDED: 5}
    assert server.ids("slow").count("at-once") == 1


async def test_a_caller_that_waits_too_long_for_the_same_call_gets_a_transient_error(
    shop: Platform, server: ToolServer
) -> None:
    server.hold.clear()
    first = asyncio.create_task(call(shop, "acme", "slow", key="waiting"))
    await server.arrived("waiting")
    with pytest.raises(Transient):
        await call(shop, "acme", "slow", key="waiting", timeout=1)
    server.hold.set()
    assert (await first).outcome == CallReply.OUTCOME_SUCCEEDED


async def test_a_caller_that_goes_away_finds_the_outcome_when_it_asks_again(shop: Platform, server: ToolServer) -> None:
    server.hold.clear()
    first = asyncio.create_task(call(shop, "acme", "slow_once", key="gone-away"))
    await server.arrived("gone-away")
    first.cancel()
    server.hold.set()
    again = await call(shop, "acme", "slow_once", key="gone-away")
    assert again.outcome == CallReply.OUTCOME_SUCCEEDED
    assert server.ids("slow_once").count("gone-away") == 1


async def test_fifty_megabytes_are_cut_off(shop: Platform, server: ToolServer) -> None:
    reply = await call(shop, "acme", "huge", key="huge")
    assert reply.outcome == CallReply.OUTCOME_FAILED
    assert "too large" in reply.error
    assert reply.result_json == ""
    assert server.megabytes < 50


async def test_a_tool_that_never_answers_has_an_outcome_before_the_caller_gives_up(
    shop: Platform, server: ToolServer
) -> None:
    read = await call(shop, "acme", "silent", key="silent", timeout=3)
    assert read.outcome == CallReply.OUTCOME_FAILED
    assert "no answer" in read.error
    server.hold.clear()
    bought = await call(shop, "acme", "slow_once", key="silent-once", timeout=3)
    server.hold.set()
    assert bought.outcome == CallReply.OUTCOME_UNKNOWN
    # The outcome is final: a repeated request does not call the tool again.
    assert await call(shop, "acme", "slow_once", key="silent-once") == bought
    assert server.ids("slow_once").count("silent-once") == 1


async def test_a_refusal_and_an_invalid_answer_are_failures_with_a_reason(shop: Platform) -> None:
    refused = await call(shop, "acme", "refusing", key="refusing")
    assert (refused.outcome, refused.error) == (CallReply.OUTCOME_FAILED, "HTTP 404: no such customer")
    nonsense = await call(shop, "acme", "talkative", key="talkative")
    assert (nonsense.outcome, nonsense.error) == (CallReply.OUTCOME_FAILED, "the answer is not JSON")


async def test_a_busy_tool_is_asked_again_with_the_same_key(shop: Platform, server: ToolServer) -> None:
    server.busy = 1
    reply = await call(shop, "acme", "busy", key="busy")
    assert reply.outcome == CallReply.OUTCOME_SUCCEEDED
    assert server.ids("busy") == ["busy", "busy"]


async def test_an_unknown_tool_and_a_tool_of_another_tenant_are_not_found(shop: Platform) -> None:
    for tenant, name in (("acme", "nothing"), ("other", "order")):
        with pytest.raises(NotFound):
            await call(shop, tenant, name, key="nothing")


async def test_after_a_kill_a_keyed_call_is_repeated_and_a_once_call_is_not(shop: Platform, server: ToolServer) -> None:
    server.hold.clear()
    asked = [asyncio.create_task(call(shop, "acme", name, key=f"killed-{name}")) for name in ("slow", "slow_once")]
    await server.arrived("killed-slow")
    await server.arrived("killed-slow_once")
    saved = await call(shop, "acme", "order", key="before-the-kill")
    shop.kill("plugin")
    assert all(isinstance(lost, Transient) for lost in await asyncio.gather(*asked, return_exceptions=True))
    server.hold.set()
    await shop.start("plugin")

    keyed = await call(shop, "acme", "slow", key="killed-slow")
    assert keyed.outcome == CallReply.OUTCOME_SUCCEEDED
    assert server.ids("slow").count("killed-slow") == 2
    once = await call(shop, "acme", "slow_once", key="killed-slow_once")
    assert once.outcome == CallReply.OUTCOME_UNKNOWN
    assert server.ids("slow_once").count("killed-slow_once") == 1
    # Both attempts may have had a cost. A call whose outcome was recorded is not billed again.
    assert await usage(shop, "killed-slow/") == ["killed-slow/tool/1", "killed-slow/tool/2"]
    assert await usage(shop, "killed-slow_once/") == ["killed-slow_once/tool/1"]
    assert await call(shop, "acme", "order", key="before-the-kill") == saved
    assert server.ids("order").count("before-the-kill") == 1
