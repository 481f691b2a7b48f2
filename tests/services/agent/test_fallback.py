"""Models that give no answer, and the cost of attempts without an answer."""

from __future__ import annotations

import asyncio

from tests.services.agent.conftest import MODEL, Tenant, World
from tests.services.agent.test_approval import waiting
from tests.services.agent.test_queue_modes import asked
from tooling.testing.model_server import KEY, Asked, Fails, Refuses, Says, Streams
from tooling.testing.service_fakes import WEATHER

OTHER = "gpt-4o"
# That it wants thoughts is remembered, so no other test may use it.
THINKER = "o4-mini"


async def test_where_a_model_gives_no_answer_another_one_is_asked_once(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(fallback={"model": f"openai/{OTHER}"})
    world.models.script(MODEL, Fails(500), Fails(500))
    world.models.script(OTHER, Says("From the other one."))
    await tenant.receive(agent, "Hi")
    [run] = await tenant.runs(1)
    assert (run["status"], run["reply"]) == ("completed", "From the other one.")
    assert [(step["name"], step["status"], step["attempts"]) for step in run["steps"]] == [
        (f"openai/{MODEL}", "failed", 2),
        (f"openai/{OTHER}", "completed", 1),
    ]
    assert [usage["resource"] for usage in await tenant.usage()] == [f"openai/{OTHER}"]
    assert len(await tenant.sent("channel.outbound")) == 1


async def test_a_run_with_a_message_from_before_its_fallback_goes_on_after_an_approval(
    world: World, tenant: Tenant
) -> None:
    agent = await tenant.agent(
        queue_mode="steer",
        tools=[WEATHER],
        approval=[WEATHER],
        system_prompt=tenant.id,
        fallback={"model": f"openai/{OTHER}"},
    )
    go = asyncio.Event()
    # The message comes during the first call. Both models get it then.
    world.models.script(MODEL, Says("cut off", waits=go, cut_after=1), *[Fails(400)] * 3)
    world.models.script(OTHER, Says(calls=((WEATHER, '{"city":"Bern"}'),)), Says("Wet in both."))
    run_id = await tenant.say(agent, "Bern?")
    await asked(world, tenant, 1)
    assert await tenant.say(agent, "And Rome?") == run_id
    go.set()
    await waiting(tenant)
    await tenant.call("POST", f"/api/v1/runs/{run_id}/approval", json={"approved": True})
    run = await tenant.over(run_id)
    assert (run["status"], run["reply"]) == ("completed", "Wet in both.")


async def test_the_thoughts_of_a_model_are_not_sent_to_its_fallback(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(tools=[WEATHER], fallback={"model": f"openai/{OTHER}"})
    call = {"index": 0, "id": "a", "function": {"name": WEATHER, "arguments": '{"city":"Bern"}'}, "extra_content": "s"}
    delta = {"reasoning_content": "They want the weather.", "tool_calls": [call]}
    answer = Streams(({"choices": [{"index": 0, "delta": delta, "finish_reason": "tool_calls"}]},))
    world.models.script(MODEL, answer, Fails(400))
    world.models.script(OTHER, Says("Wet."))
    run = await tenant.over(await tenant.say(agent, "Weather?"))
    assert run["reply"] == "Wet."
    own, others = world.models.requests[-2:]
    fields = [
        {"role", "content", "reasoning_content", "tool_calls"},
        {"id", "type", "function", "extra_content"},
        {"role", "content", "tool_calls"},
        {"id", "type", "function"},
    ]
    told = [request.body["messages"][-2] for request in (own, others)]
    assert [set(one) for message in told for one in (message, message["tool_calls"][0])] == fields


async def test_a_fallback_that_wants_thoughts_gets_blank_ones(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(tools=[WEATHER], fallback={"model": f"openai/{THINKER}"})
    message = "thinking is enabled but reasoning_content is missing in assistant tool call message at index 2"

    def thinking(asked: Asked) -> Says | Refuses:
        called = [message for message in asked.body["messages"] if "tool_calls" in message]
        complete = all(message.get("reasoning_content") for message in called)
        return Says("Wet.") if complete else Refuses(400, {"error": {"message": message}})

    world.models.rules[THINKER] = thinking
    world.models.script(MODEL, Says(calls=((WEATHER, '{"city":"Bern"}'),)), Fails(400))
    run = await tenant.over(await tenant.say(agent, "Weather?"))
    assert (run["status"], run["reply"]) == ("completed", "Wet.")


async def test_a_fallback_elsewhere_has_a_key_of_its_own(world: World, tenant: Tenant) -> None:
    provider = {"base_url": world.models.url, "api_key": KEY}
    agent = await tenant.agent(
        provider={"base_url": world.models.url, "api_key": f"not for {tenant.id}"},
        fallback={"model": f"anthropic/{OTHER}", "provider": provider},
    )
    world.models.script(OTHER, Says("From the other one."))
    run = await tenant.over(await tenant.say(agent, "Hi"))
    assert run["reply"] == "From the other one."
    # A permanent refusal is not retried.
    assert run["steps"][0]["attempts"] == 1
    refusal = f"/v1/chat/completions: authorization 'Bearer not for {tenant.id}'"
    assert world.models.refused == [refusal]
    shown = await tenant.call("GET", f"/api/v1/agents/{agent}")
    assert shown["fallback"] == {"model": f"anthropic/{OTHER}", "provider": {"base_url": world.models.url}}
    # The key is kept as long as the address stays the same.
    await tenant.call("PATCH", f"/api/v1/agents/{agent}", json={"system_prompt": "Be brief."})
    world.models.script(OTHER, Says("Again."))
    assert (await tenant.over(await tenant.say(agent, "Hi")))["reply"] == "Again."
    assert world.models.refused == [refusal] * 2
    world.models.refused.clear()


async def test_an_answer_that_was_cut_off_is_paid_for_by_estimate(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    world.models.script(MODEL, Says("x" * 400, cut_after=50), Says("Whole."))
    run = await tenant.over(await tenant.say(agent, "Hi"))
    assert (run["reply"], run["steps"][0]["attempts"]) == ("Whole.", 2)
    lost, used = await tenant.usage()
    assert (lost["usage_id"], lost["estimated"], lost["hold_id"]) == (f"{run['id']}/1/1", True, None)
    # 50 pieces of four characters.
    assert lost["quantities"]["output_tokens"] == 50
    assert lost["quantities"]["input_tokens"] > 0
    assert (used["usage_id"], used["estimated"]) == (f"{run['id']}/1/2", False)
    assert used["hold_id"]


async def test_an_answer_that_is_cancelled_half_way_is_paid_for_by_estimate(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    world.models.script(MODEL, Says("x" * 40, stalls_after=5))
    run_id = await tenant.say(agent, "Hi")

    async def running() -> bool:
        return bool((await tenant.run(run_id))["status"] == "running")

    await world.platform.until(running)
    await tenant.call("POST", f"/api/v1/runs/{run_id}/cancel")
    await tenant.over(run_id)
    assert [usage["estimated"] for usage in await tenant.usage()] in ([], [True])
