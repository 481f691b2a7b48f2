"""The whole way inside the agent: a message comes in, a run answers it, the reply goes out, its usage is reported."""

from __future__ import annotations

import json

import pytest

from infra.clock import uuid7
from protos.plugin.v1 import plugin_pb2
from tests.services.agent.conftest import MODEL, Tenant, World
from tooling.testing.model_server import Fails, Says, Streams
from tooling.testing.service_fakes import CALCULATOR, WEATHER

UNKNOWN = plugin_pb2.CallReply(outcome=plugin_pb2.CallReply.OUTCOME_UNKNOWN, error="it did not answer")
FAILED = plugin_pb2.CallReply(outcome=plugin_pb2.CallReply.OUTCOME_FAILED, error="no such city")


async def test_a_channels_message_is_answered_and_its_usage_told(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    world.models.script(MODEL, Says("Hello, person.", usage=(100, 60, 9, 4)))
    await tenant.receive(agent, "Hi 🦀\u200f there")
    [item] = await tenant.runs(1)
    run = await tenant.run(item["id"])
    assert (run["status"], run["reply"], run["error"]) == ("completed", "Hello, person.", None)
    assert run["usage"] == {"input_tokens": 100, "cached_tokens": 60, "output_tokens": 9}
    assert [(s["n"], s["kind"], s["name"], s["status"]) for s in run["steps"]] == [
        (1, "model", f"openai/{MODEL}", "completed")
    ]
    asked = world.models.requests[-1]
    assert (asked.last_user_text, asked.system) == ("Hi 🦀\u200f there", "Be kind.")
    [send] = await tenant.sent("channel.outbound")
    assert (send["conversation_id"], send["text"], send["run_id"], send["reply_to"]) == (
        "c",
        "Hello, person.",
        run["id"],
        "m1",
    )
    [usage] = await tenant.usage()
    assert usage["usage_id"] == f"{run['id']}/1/1"
    assert usage["resource"] == f"openai/{MODEL}"
    assert usage["quantities"] == {
        "input_tokens": 100,
        "cached_tokens": 60,
        "output_tokens": 9,
        "reasoning_tokens": 4,
    }
    hold = world.peers.billing.holds[usage["hold_id"]]
    assert hold.resource == usage["resource"]
    assert usage["hold_id"] not in world.peers.billing.released
    facts = await tenant.sent("agent.events")
    assert [fact["n"] for fact in facts] == [1, 2, 3, 4]
    assert facts[-1]["reply"] == "Hello, person."


async def test_knowledge_and_a_tool_go_into_the_answer(world: World, tenant: Tenant) -> None:
    world.peers.memory.passages.append((tenant.id, "Bern is wet.", "cities.md"))
    agent = await tenant.agent(tools=[WEATHER, CALCULATOR], knowledge=True)
    world.models.script(MODEL, Says(calls=((WEATHER, '{"city":"Bern"}'),)), Says("Wet, says cities.md."))
    run = await tenant.over(await tenant.say(agent, "Weather in Bern?"))
    assert (run["status"], run["reply"]) == ("completed", "Wet, says cities.md.")
    assert [(s["kind"], s["name"], s["status"]) for s in run["steps"]] == [
        ("retrieve", "", "completed"),
        ("model", f"openai/{MODEL}", "completed"),
        ("tool", WEATHER, "completed"),
        ("model", f"openai/{MODEL}", "completed"),
    ]
    first, second = world.models.requests[-2:]
    assert 'source="cities.md, page 1">\nBern is wet.\n' in first.system
    assert {tool["function"]["name"] for tool in first.body["tools"]} == {WEATHER, CALCULATOR}
    assert (second.body["messages"][-1]["role"], json.loads(second.body["messages"][-1]["content"])) == (
        "tool",
        {"result": "weather of Bern"},
    )
    assert second.last_user_text == "Weather in Bern?"
    asked = world.peers.memory.requests[-1]
    assert (asked.query, list(asked.types), asked.agent_id) == ("Weather in Bern?", ["document", "memory"], agent)
    completed = (await tenant.sent("agent.events"))[-1]
    assert completed["said"] == "Weather in Bern?"
    assert completed["subject_id"] == asked.subject_id != ""
    assert completed["session_key"] == asked.session_key
    assert [usage["usage_id"] for usage in await tenant.usage()] == [
        f"{run['id']}/2/1",
        f"{run['id']}/4/1",
    ]


async def test_a_tool_that_the_agent_does_not_have_is_not_called(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(tools=[CALCULATOR])
    before = dict(world.peers.plugin.calls)
    world.models.script(MODEL, Says(calls=((WEATHER, '{"city":"Bern"}'),)), Says("I cannot."))
    run = await tenant.over(await tenant.say(agent, "Weather?"))
    assert run["reply"] == "I cannot."
    assert run["steps"][1]["status"] == "failed"
    assert world.peers.plugin.calls == before
    assert world.models.requests[-1].body["messages"][-1]["content"] == f"Error: there is no tool {WEATHER}"


async def test_a_tool_that_fails_is_told_to_the_model(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(tools=[WEATHER])
    world.peers.plugin.outcomes[WEATHER] = [FAILED]
    world.models.script(MODEL, Says(calls=((WEATHER, '{"city":"?"}'), (WEATHER, "{oops"))), Says("I cannot."))
    run = await tenant.over(await tenant.say(agent, "Weather?"))
    assert (run["status"], run["reply"]) == ("completed", "I cannot.")
    told = [message["content"] for message in world.models.requests[-1].body["messages"][-2:]]
    assert told == ["Error: no such city", "Error: arguments: must be JSON"]


async def test_a_tool_whose_effect_nobody_knows_makes_the_run_indeterminate(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(tools=[WEATHER])
    world.peers.plugin.outcomes[WEATHER] = [UNKNOWN]
    world.models.script(MODEL, Says(calls=((WEATHER, '{"city":"Bern"}'),)))
    run = await tenant.over(await tenant.say(agent, "Weather?"))
    assert (run["status"], run["error"]) == ("indeterminate", "weather: it did not answer")
    facts = (await tenant.call("GET", f"/internal/runs/{run['id']}/events"))["items"]
    assert facts[-1]["type"] == "agent.v1.RunIndeterminate"
    assert facts[-1]["data"] == (await tenant.sent("agent.events"))[-1]
    assert (facts[-1]["data"]["step"], facts[-1]["data"]["tool"]) == (2, WEATHER)


async def test_without_credit_the_person_gets_a_clear_refusal_and_no_model_is_asked(
    world: World, tenant: Tenant
) -> None:
    agent = await tenant.agent()
    world.peers.billing.broke.add(tenant.id)
    asked = len(world.models.requests)
    await tenant.receive(agent, "Hi")
    [run] = await tenant.runs(1)
    assert (run["status"], run["error"]) == ("refused", "the tenant's credit does not suffice for a model call")
    [send] = await tenant.sent("channel.outbound")
    assert "credit" in send["text"]
    assert len(world.models.requests) == asked
    assert await tenant.usage() == []
    # Nothing is lost: when there is credit again, the model sees the earlier question.
    world.peers.billing.broke.clear()
    await tenant.receive(agent, "Again")
    await tenant.runs(2)
    assert [message["content"] for message in world.models.requests[-1].body["messages"][1:]] == ["Hi", "Again"]


async def test_a_tool_that_cannot_be_paid_is_not_called_and_the_model_is_told(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(tools=[CALCULATOR])
    calls = dict(world.peers.plugin.calls)
    world.peers.billing.dear.add(f"tool/{CALCULATOR}")
    world.models.script(MODEL, Says(calls=((CALCULATOR, '{"expression":"1+1"}'),)), Says("I cannot."))
    run = await tenant.over(await tenant.say(agent, "Sum?"))
    world.peers.billing.dear.clear()
    assert (run["reply"], run["steps"][1]["status"]) == ("I cannot.", "failed")
    told = world.models.requests[-1].body["messages"][-1]["content"]
    assert told == f"Error: the tenant's credit does not suffice for the tool {CALCULATOR}"
    assert world.peers.plugin.calls == calls


async def test_the_hold_of_a_tool_is_closed_by_the_record_of_its_call(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(tools=[WEATHER])
    world.models.script(MODEL, Says(calls=((WEATHER, '{"city":"Bern"}'),)), Says("Wet."))
    await tenant.over(await tenant.say(agent, "Weather?"))
    asked = world.peers.plugin.requests[-1]
    hold = world.peers.billing.holds[asked.hold_id]
    assert (hold.resource, dict(hold.quantities)) == (f"tool/{WEATHER}", {"calls": 1})
    for name in ("agent_id", "channel_id", "session_key", "api_key_id"):
        assert getattr(hold, name) == getattr(asked, name)
    assert hold.session_key
    assert hold.agent_id == agent


async def test_while_billing_does_not_answer_no_model_is_asked_and_the_message_waits(
    world: World, tenant: Tenant
) -> None:
    agent = await tenant.agent()
    world.peers.billing.silent.add(tenant.id)
    asked, refused = len(world.models.requests), world.peers.billing.unanswered
    await tenant.receive(agent, "Hi")
    await world.platform.until(lambda: _is(world.peers.billing.unanswered > refused))
    assert len(world.models.requests) == asked
    assert await tenant.usage() == []
    world.peers.billing.silent.clear()
    [run] = await tenant.runs(1)
    assert run["status"] == "completed"


async def _is(value: bool) -> bool:
    return value


async def test_over_a_rate_the_person_is_asked_to_send_the_message_again(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    world.peers.billing.hurried.add(tenant.id)
    await tenant.receive(agent, "Hi")
    [run] = await tenant.runs(1)
    assert (run["status"], run["error"]) == (
        "refused",
        "the budget (tenant, 1 a minute) does not suffice for a model call",
    )
    [send] = await tenant.sent("channel.outbound")
    assert "again in a minute" in send["text"]
    assert "credit" not in send["text"]


async def test_an_agent_spends_no_more_than_its_budget(world: World, tenant: Tenant) -> None:
    billing = world.peers.billing
    agent = await tenant.agent(budget={"nanos": 20_000, "period": "month"})
    first = await tenant.over(await tenant.say(agent, "Hi"))
    assert first["status"] == "completed"
    # The estimate of one call is more than half of the budget, so the second needs the true cost of the first.
    second = await tenant.over(await tenant.say(agent, "Hi"))
    assert (second["status"], second["error"]) == ("refused", "the agent's budget of this month is used up")
    billing.charge(first["id"], f"{first['id']}/1/1", amount_nanos=170)
    billing.charge(first["id"], f"{first['id']}/seconds", amount_nanos=0)
    third = await tenant.over(await tenant.say(agent, "Hi"))
    assert third["status"] == "completed"
    assert (await tenant.run(first["id"]))["cost_nanos"] == 170
    # A page of runs is one call of billing.
    billing.charges_asked.clear()
    shown = {run["id"]: run["cost_nanos"] for run in (await tenant.call("GET", "/api/v1/runs?limit=2"))["items"]}
    assert shown == {third["id"]: None, second["id"]: 0}
    assert billing.charges_asked == [[third["id"], second["id"]]]


async def test_a_busy_provider_is_asked_again_when_it_said(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    holds = set(world.peers.billing.holds)
    world.models.script(MODEL, Fails(429, retry_after=1), Fails(500), Says("At last."))
    run = await tenant.over(await tenant.say(agent, "Hi"))
    assert (run["status"], run["reply"]) == ("completed", "At last.")
    [step] = run["steps"]
    assert (step["status"], step["attempts"]) == ("completed", 3)
    [usage] = await tenant.usage()
    assert usage["usage_id"] == f"{run['id']}/1/3"
    # All attempts share one hold.
    assert set(world.peers.billing.holds) - holds == {usage["hold_id"]}


async def test_a_provider_that_refuses_ends_the_run_with_one_plain_message(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    holds = set(world.peers.billing.holds)
    world.models.script(MODEL, Fails(400))
    await tenant.receive(agent, "Hi")
    [run] = await tenant.runs(1)
    assert (run["status"], run["error"]) == ("failed", f"openai/{MODEL}: HTTP 400: scripted")
    [send] = await tenant.sent("channel.outbound")
    assert send["text"].startswith("Sorry")
    [hold] = set(world.peers.billing.holds) - holds
    assert hold in world.peers.billing.released


@pytest.mark.parametrize("text", ["Far too much. " * 80_000, "\x00" * 200_000])
async def test_an_answer_that_no_message_can_carry_ends_the_run(world: World, tenant: Tenant, text: str) -> None:
    agent = await tenant.agent()
    world.models.script(MODEL, Says(text, whole=True), Says("Short."))
    await tenant.receive(agent, "Hi")
    [item] = await tenant.runs(1)
    run = await tenant.run(item["id"])
    assert (run["status"], run["reply"]) == ("failed", None)
    assert run["error"] == f"openai/{MODEL}: the answer has more than 900000 bytes as JSON"
    # The session goes on.
    assert (await tenant.over(await tenant.say(agent, "Again")))["reply"] == "Short."


async def test_what_the_provider_does_not_report_is_not_zero(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    world.models.script(MODEL, Says("Yes.", usage=None))
    run = await tenant.over(await tenant.say(agent, "?"))
    assert run["usage"] == {"input_tokens": None, "cached_tokens": None, "output_tokens": None}
    [usage] = await tenant.usage()
    assert usage["quantities"] == {"calls": 1}


CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "people": {"type": "integer"}},
    "required": ["city", "people"],
    "additionalProperties": False,
}


async def test_an_answer_that_does_not_fit_the_schema_is_asked_for_again(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(output_schema=CITY)
    fits = '{"city": "Bern", "people": 146348}'
    world.models.script(MODEL, Says("Bern."), Says('{"city": "Bern"}'), Says(fits))
    run = await tenant.over(await tenant.say(agent, "Bern?"))
    assert (run["status"], run["reply"]) == ("completed", fits)
    first, second, third = world.models.requests[-3:]
    assert first.body["response_format"]["json_schema"]["schema"]["required"] == ["city", "people"]
    assert "not JSON" in second.system
    assert "answer.people: missing" in third.system
    # The person's words are still the last ones.
    assert third.last_user_text == "Bern?"


async def test_a_model_that_never_fits_the_schema_ends_the_run(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(output_schema=CITY, model="anthropic/claude-x")
    world.models.script("claude-x", *[Says('{"city": "Bern", "people": "many"}')] * 3)
    run = await tenant.over(await tenant.say(agent, "Bern?"))
    assert (run["status"], run["error"]) == (
        "failed",
        "anthropic/claude-x: the answer does not fit: answer.people: must be integer",
    )


async def test_memory_away_for_a_moment_costs_an_attempt(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(knowledge=True)
    # The call itself is repeated four times by gRPC.
    world.peers.memory.away = 4
    run = await tenant.over(await tenant.say(agent, "Hi"))
    assert run["status"] == "completed"
    assert (run["steps"][0]["kind"], run["steps"][0]["attempts"]) == ("retrieve", 2)


async def test_an_agent_that_is_disabled_or_not_there_refuses_in_silence(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    await tenant.call("PATCH", f"/api/v1/agents/{agent}", json={"enabled": False})
    await tenant.receive(agent, "Hi")
    nobody = uuid7()
    await tenant.receive(str(nobody), "Hi", chat="other")
    runs = await tenant.runs(2)
    assert {(run["status"], run["error"]) for run in runs} == {
        ("refused", "the agent is disabled"),
        ("refused", f"there is no agent {nobody}"),
    }
    assert await tenant.sent("channel.outbound") == []


async def test_limits_end_a_run_that_has_had_enough(world: World, tenant: Tenant) -> None:
    call = Says(calls=((WEATHER, '{"city":"Bern"}'),), usage=(20, 0, 7, 0))
    for limits, error in (
        ({"steps": 3}, "the limit of 3 steps is reached"),
        ({"tokens": 50}, "the limit of 50 tokens is reached"),
    ):
        agent = await tenant.agent(tools=[WEATHER], limits=limits)
        world.models.script(MODEL, call, call)
        run = await tenant.over(await tenant.say(agent, "Weather?"))
        assert (run["status"], run["error"]) == ("failed", error)
        world.models.forget()
    agent = await tenant.agent(limits={"seconds": 1})
    for n, answer in enumerate((Says("Long text", stalls_after=1), Says("Drips. " * 1_000, drips_every=0.2))):
        world.models.script(MODEL, answer)
        run = await tenant.over(await tenant.say(agent, "Hi", session=str(n)))
        assert (run["status"], run["error"]) == ("failed", "the limit of 1 seconds is reached")


@pytest.mark.parametrize("reason", ["stop", "length", "content_filter"])
async def test_the_run_shows_why_its_reply_ends(world: World, tenant: Tenant, reason: str) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "A text"}, "finish_reason": reason}]}
    base = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    world.models.script(MODEL, Streams((base | chunk,)))
    run = await tenant.over(await tenant.say(await tenant.agent(), "Hi"))
    assert (run["reply"], run["finish_reason"]) == ("A text", reason)
    [listed] = (await tenant.call("GET", "/api/v1/runs"))["items"]
    assert listed["finish_reason"] == reason


@pytest.mark.parametrize("schema", [None, CITY])
async def test_a_person_reads_the_refusal_of_a_model(
    world: World, tenant: Tenant, schema: dict[str, object] | None
) -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 3}
    chunks = (
        {"choices": [{"index": 0, "delta": {"refusal": "I cannot do that."}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": usage},
    )
    base = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    world.models.script(MODEL, Streams(tuple(base | chunk for chunk in chunks)))
    before = len(world.models.requests)
    await tenant.receive(await tenant.agent(output_schema=schema), "Bern?")
    [item] = await tenant.runs(1)
    run = await tenant.run(item["id"])
    error = f"openai/{MODEL}: the model refused to answer"
    expected = ("failed", error, None) if schema else ("completed", None, "I cannot do that.")
    assert (run["status"], run["error"], run["reply"]) == expected
    [send] = await tenant.sent("channel.outbound")
    assert send["text"] == "I cannot do that."
    # It is paid once, and is not asked for again.
    assert (run["usage"]["output_tokens"], len(world.models.requests)) == (3, before + 1)


async def test_an_answer_that_the_provider_withheld_is_paid_as_reported(world: World, tenant: Tenant) -> None:
    chunk = {"choices": [{"index": 0, "delta": {}, "finish_reason": "content_filter"}]}
    base = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    usage = {"usage": {"prompt_tokens": 40, "completion_tokens": 0}}
    world.models.script(MODEL, Streams((base | chunk | usage,)))
    run = await tenant.over(await tenant.say(await tenant.agent(), "Hi"))
    withheld = f"openai/{MODEL}: the provider's content filter withheld the answer"
    assert (run["status"], run["error"]) == ("failed", withheld)
    [used] = await tenant.usage()
    assert (used["usage_id"], used["estimated"]) == (f"{run['id']}/1/1", False)
    assert used["quantities"]["input_tokens"] == 40


async def test_the_offline_model_answers_from_the_documents_and_calculates(world: World, tenant: Tenant) -> None:
    text = "# Returns\nGoods go back within 30 days. Shipping is free."
    world.peers.memory.passages.append((tenant.id, text, "handbook.md"))
    agent = await tenant.agent(model="scripted/answer", provider=None, knowledge=True, tools=[CALCULATOR])
    run = await tenant.over(await tenant.say(agent, "Within how many days do goods go back?"))
    assert run["reply"].startswith("Goods go back within 30 days. [handbook.md, page 1]")
    assert "no language model was asked" in run["reply"]
    assert run["usage"]["input_tokens"] > 0
    run = await tenant.over(await tenant.say(agent, "What is 17 * (2 + 3)?"))
    assert [step["kind"] for step in run["steps"]] == ["retrieve", "model", "tool", "model"]
    assert "calculator of 17 * (2 + 3)" in run["reply"]


@pytest.mark.parametrize(
    ("finish", "arguments", "reason"),
    [
        *(("length", arguments, "reached the limit of tokens") for arguments in ('{"city":"Bern"}', '{"ci', "{}")),
        ("content_filter", '{"city":"Bern"}', "a content filter"),
    ],
)
async def test_a_call_in_an_answer_that_was_cut_is_not_made(
    world: World, tenant: Tenant, finish: str, arguments: str, reason: str
) -> None:
    call = {"index": 0, "id": "a", "type": "function", "function": {"name": WEATHER, "arguments": arguments}}
    chunks = (
        {"choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]},
    )
    base = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    world.models.script(MODEL, Streams(tuple(base | chunk for chunk in chunks)), Says("I cannot."))
    before = dict(world.peers.plugin.calls)
    run = await tenant.over(await tenant.say(await tenant.agent(tools=[WEATHER]), "Weather?"))
    assert (run["status"], run["reply"]) == ("completed", "I cannot.")
    assert world.peers.plugin.calls == before
    assert [(step["kind"], step["status"]) for step in run["steps"] if step["kind"] == "tool"] == [("tool", "failed")]
    told = world.models.requests[-1].body["messages"][-1]
    assert told["role"] == "tool"
    assert reason in told["content"]
