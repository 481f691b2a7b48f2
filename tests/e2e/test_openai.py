"""OpenAI's own client uses an agent as a model, through the gateway."""

from __future__ import annotations

from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from tooling.testing.model_server import KEY, ModelServer, Says
from tooling.testing.system import System
from tooling.testing.until import until

MODEL = "gpt-4o-mini"


def openai_client(system: System, key: str) -> AsyncOpenAI:
    http = httpx2.AsyncClient(trust_env=False, timeout=60)
    return AsyncOpenAI(base_url=f"{system.base_url}/v1", api_key=key, http_client=http)


async def agent_of(system: System, key: str, models: ModelServer) -> str:
    provider = {"base_url": models.url, "api_key": KEY}
    body = {"name": "Helper", "model": f"openai/{MODEL}", "provider": provider, "system_prompt": "Be kind."}
    async with system.client(key) as api:
        answer = await api.post("/api/v1/agents", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def run_of(system: System, key: str, agent: str) -> dict[str, Any] | None:
    async with system.client(key) as api:
        items: list[dict[str, Any]] = (await api.get("/api/v1/runs", params={"agent_id": agent})).json()["items"]
    return items[0] if items else None


async def test_a_conversation_is_answered_whole_and_in_parts(system: System, models: ModelServer) -> None:
    key = await system.tenant("Speakers")
    agent = await agent_of(system, key, models)
    async with openai_client(system, key) as client:
        assert [model.id for model in (await client.models.list()).data] == [agent]
        models.script(MODEL, Says("Good day.", usage=(12, 2, 5, 0)))
        whole = await client.chat.completions.create(
            model=agent,
            messages=[
                {"role": "system", "content": "In French."},
                {"role": "user", "content": "One"},
                {"role": "assistant", "content": "Yes?"},
                {"role": "user", "content": "Two"},
            ],
        )
        assert (whole.choices[0].message.content, whole.usage and whole.usage.total_tokens) == ("Good day.", 17)
        system_message, *turns = models.requests[-1].body["messages"]
        assert system_message["content"].startswith("Be kind.\n\n")
        assert system_message["content"].endswith("In French.")
        assert [turn["content"] for turn in turns] == ["One", "Yes?", "Two"]

        text = "A longer text, in many pieces, each of which is sent on."
        models.script(MODEL, Says(text))
        async with client.chat.completions.stream(model=agent, messages=[{"role": "user", "content": "Hi"}]) as stream:
            assert (await stream.get_final_completion()).choices[0].message.content == text
        models.script(MODEL, Says(text))
        async with client.responses.stream(model=agent, input="Hi") as response:
            assert (await response.get_final_response()).output_text == text


async def test_a_client_that_disconnects_cancels_the_run(system: System, models: ModelServer) -> None:
    key = await system.tenant("Leavers")
    agent = await agent_of(system, key, models)
    models.script(MODEL, Says("A long text", stalls_after=1))
    async with openai_client(system, key) as client:
        stream = await client.chat.completions.create(
            model=agent, messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        await anext(stream)
        await stream.close()

    async def cancelled() -> bool:
        run = await run_of(system, key, agent)
        return bool(run and run["status"] == "cancelled")

    await until(cancelled)


async def test_refusals_are_errors_of_the_clients_own_types(system: System, models: ModelServer) -> None:
    key = await system.tenant("Poor", credit_nanos=1)
    agent = await agent_of(system, key, models)
    async with openai_client(system, key) as client:
        with pytest.raises(openai.RateLimitError) as refused:
            await client.chat.completions.create(model=agent, messages=[{"role": "user", "content": "Hi"}])
        assert refused.value.code == "insufficient_quota"
    async with openai_client(system, await system.tenant("Other")) as client:
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model=agent, messages=[{"role": "user", "content": "Hi"}])
    async with openai_client(system, "claw_none") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
