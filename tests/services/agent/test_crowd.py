"""Two hundred conversations of twenty tenants at once: each gets only its own replies in order, and none waits for the
tenant with most messages."""

from __future__ import annotations

import asyncio
import json
import re

from tests.services.agent.conftest import Tenant, World
from tooling.testing.model_server import Asked, Says

MODEL = "gpt-4.1-nano"
TENANTS, SESSIONS, ROUNDS = 20, 10, 2
# As many sessions as all other tenants together.
GREEDY_SESSIONS = TENANTS * SESSIONS


def answers(asked: Asked, waits: asyncio.Event | None) -> Says:
    """An answer with the tenant's word from the system prompt and the passages."""
    words = " ".join(sorted(set(re.findall(r"word-[0-9a-f-]+", asked.system))))
    return Says(f"{asked.last_user_text} / {words}", waits=waits)


async def ask(world: World, tenant: Tenant, sessions: int, rounds: int) -> None:
    word = f"word-{tenant.id.removeprefix('t-')}"
    world.peers.memory.passages.append((tenant.id, f"The word is {word}.", "words.md"))
    prompt = f"You know {word}."
    agent = await tenant.agent(model=f"openai/{MODEL}", knowledge=True, queue_mode="followup", system_prompt=prompt)
    for n in range(rounds):
        await asyncio.gather(
            *(
                tenant.receive(
                    agent, f"{tenant.id} {session} {n}", chat=f"c{session}", person=f"p{session}", position=n + 1
                )
                for session in range(sessions)
            )
        )


async def test_a_crowd_is_answered_each_in_turn_and_nobody_hears_another(world: World) -> None:
    greedy, tenants = world.tenant(), [world.tenant() for _ in range(TENANTS)]
    # The greedy tenant's runs hold their places until all other runs have ended.
    others_done = asyncio.Event()
    world.models.rules[MODEL] = lambda asked: answers(asked, others_done if greedy.id in asked.last_user_text else None)

    async def completed(of: list[Tenant], runs: int) -> bool:
        async with world.platform.database("agent").begin() as tx:
            [(count,)] = await tx.sql(
                "SELECT count(*) FROM run WHERE status = 'completed' AND tenant_id = ANY($1::text[])",
                [tenant.id for tenant in of],
            )
        return bool(count == runs)

    await ask(world, greedy, GREEDY_SESSIONS, 1)
    await asyncio.gather(*(ask(world, tenant, SESSIONS, ROUNDS) for tenant in tenants))
    await world.platform.until(lambda: completed(tenants, TENANTS * SESSIONS * ROUNDS))
    others_done.set()
    await world.platform.until(lambda: completed([greedy], GREEDY_SESSIONS))
    for tenant in (greedy, *tenants):
        rounds, sessions = (1, GREEDY_SESSIONS) if tenant is greedy else (ROUNDS, SESSIONS)
        said: dict[str, list[str]] = {}
        for message in await tenant.sent("channel.outbound"):
            said.setdefault(message["conversation_id"], []).append(message["text"])
        word = f"word-{tenant.id.removeprefix('t-')}"
        assert said == {
            f"c{session}": [f"{tenant.id} {session} {n} / {word}" for n in range(rounds)] for session in range(sessions)
        }
    for request in world.models.asked(MODEL):
        assert len(set(re.findall(r"(?:word|t)-([0-9a-f]{8}-[0-9a-f-]{27})", json.dumps(request.body)))) == 1
        assert len(set(re.findall(r"t-[0-9a-f-]{36} (\d+) \d", json.dumps(request.body)))) == 1
