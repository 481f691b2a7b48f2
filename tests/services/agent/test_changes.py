"""A person edits or deletes a message of a channel."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest

from infra.clock import uuid7
from services.agent.runs.notices import DELETED
from tests.services.agent.conftest import MODEL, Tenant, World
from tests.services.agent.test_approval import waiting
from tests.services.agent.test_queue_modes import asked, of
from tooling.testing.model_server import Says
from tooling.testing.service_fakes import WEATHER

CORRECTED = "[The person has edited an earlier message. It now reads:]\n"


async def stored(tenant: Tenant, count: int) -> None:
    """Returns once the session has `count` messages."""
    await rows(tenant, "SELECT FROM message WHERE tenant_id = $1", count)


async def rows(tenant: Tenant, statement: str, count: int) -> list[tuple[Any, ...]]:
    async def there() -> list[tuple[Any, ...]] | None:
        async with tenant.world.platform.database("agent").begin() as tx:
            found = list(await tx.sql(statement, tenant.id))
        return found if len(found) == count else None

    return await tenant.world.platform.until(there) or []


async def handled(tenant: Tenant, *changes: UUID) -> None:
    """Returns once the agent has handled these changes."""

    async def done() -> bool:
        async with tenant.world.platform.database("agent").begin() as tx:
            found = await tx.sql("SELECT FROM inbox WHERE message_id = ANY($1::uuid[])", list(changes))
        return len(found) == len(changes)

    await tenant.world.platform.until(done)


async def test_an_edit_replaces_a_text_that_no_run_has_taken(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(system_prompt=tenant.id)
    go = asyncio.Event()
    world.models.script(MODEL, Says("One.", waits=go), Says("Two."))
    await tenant.receive(agent, "first")
    await asked(world, tenant, 1)
    waits = await tenant.receive(agent, "secnd")
    await stored(tenant, 2)
    newest = await tenant.change(agent, waits, "second", order=3)
    await handled(tenant, newest)
    # An older edit that comes late.
    await handled(tenant, await tenant.change(agent, waits, "sekond", order=2))
    go.set()
    await tenant.runs(2)
    assert of(world, tenant)[1] == ["first", "One.", "second"]
    # After the answer.
    await handled(tenant, await tenant.change(agent, waits, "third", order=4))
    assert len(await tenant.runs(2)) == 2
    assert [send["text"] for send in await tenant.sent("channel.outbound")] == ["One.", "Two."]


async def test_a_run_that_has_begun_gets_the_new_text_as_a_further_message(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(system_prompt=tenant.id)
    go = asyncio.Event()
    world.models.script(MODEL, Says("Rain in Bern.", waits=go), Says("Sun in Rome."))
    taken = await tenant.receive(agent, "Bern?")
    await asked(world, tenant, 1)
    changes = [await tenant.change(agent, taken, "Rome?", order=5)]
    # The same text again: the vendor tells of a change that is none.
    changes.append(await tenant.change(agent, taken, "Rome?", order=5))
    await handled(tenant, *changes)
    go.set()
    await tenant.runs(2)
    assert of(world, tenant)[1] == ["Bern?", "Rain in Bern.", f"{CORRECTED}Rome?"]
    assert [send["text"] for send in await tenant.sent("channel.outbound")] == ["Rain in Bern.", "Sun in Rome."]


async def test_a_second_edit_replaces_the_first_one_that_no_run_has_taken(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(system_prompt=tenant.id)
    go = asyncio.Event()
    both = asyncio.Event()
    world.models.script(MODEL, Says("Rain in Bern.", waits=go), Says("Snow in Oslo.", waits=both), Says("Rain again."))
    taken = await tenant.receive(agent, "Bern?")
    await asked(world, tenant, 1)
    await handled(tenant, await tenant.change(agent, taken, "Rome?", order=5))
    await handled(tenant, await tenant.change(agent, taken, "Oslo?", order=6))
    # An older edit that comes late.
    await handled(tenant, await tenant.change(agent, taken, "Paris?", order=4))
    go.set()
    await asked(world, tenant, 2)
    assert of(world, tenant)[1][2:] == [f"{CORRECTED}Oslo?"]
    # Back to the first text, while the run of the edit is at work.
    await handled(tenant, await tenant.change(agent, taken, "Bern?", order=7))
    both.set()
    await tenant.runs(3)
    assert of(world, tenant)[2][4:] == [f"{CORRECTED}Bern?"]


async def test_the_edits_of_a_deleted_message_are_removed_with_it(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(system_prompt=tenant.id)
    go = asyncio.Event()
    world.models.script(MODEL, Says("One.", waits=go), Says("Two."))
    taken = await tenant.receive(agent, "first", vendor_message_id="7")
    await asked(world, tenant, 1)
    await handled(tenant, await tenant.change(agent, taken, "my password", vendor_message_id="7"))
    await stored(tenant, 2)
    await handled(tenant, await tenant.change(agent, taken, None, vendor_message_id="7"))
    go.set()
    await tenant.receive(agent, "next", vendor_message_id="8")
    runs = await tenant.runs(3)
    # No run answers the edit, and no later run reads it.
    assert [(run["status"], run["error"]) for run in runs] == [
        ("completed", None),
        ("cancelled", DELETED),
        ("completed", None),
    ]
    assert "password" not in str(world.models.asked(MODEL)[-1].body)
    texts = await rows(
        tenant,
        "SELECT convert_from(data, 'UTF8')::jsonb->>'text' = '' FROM event WHERE type = 'MessageAccepted' "
        "AND stream_id LIKE 'session:' || $1 || '/%' ORDER BY version",
        3,
    )
    assert texts == [(True,), (True,), (False,)]


async def test_the_new_text_of_a_message_with_files_does_not_replace_their_texts(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(system_prompt=tenant.id)
    go = asyncio.Event()
    world.models.script(MODEL, Says("One.", waits=go), Says("Two."))
    await tenant.receive(agent, "first")
    await asked(world, tenant, 1)
    waits = await tenant.receive(agent, "see this\n\n[The person sent a file. Its text:]\nplan")
    await stored(tenant, 2)
    await handled(tenant, await tenant.change(agent, waits, "see that", has_files=True))
    go.set()
    await tenant.runs(2)
    assert of(world, tenant)[1][-1] == (f"see this\n\n[The person sent a file. Its text:]\nplan\n{CORRECTED}see that")


async def test_an_edit_to_yes_approves_nothing(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(tools=[WEATHER], approval=[WEATHER], system_prompt=tenant.id)
    calls = dict(world.peers.plugin.calls)
    world.models.script(MODEL, Says(calls=((WEATHER, '{"city":"Bern"}'),)), Says("Yes to what?"))
    taken = await tenant.receive(agent, "Bern?")
    waiting = "SELECT id FROM run WHERE tenant_id = $1 AND status = 'waiting'"
    [(run_id,)] = await rows(tenant, waiting, 1)
    await handled(tenant, await tenant.change(agent, taken, "yes"))
    await tenant.runs(1)
    assert await rows(tenant, waiting, 1) == [(run_id,)]
    assert world.peers.plugin.calls == calls


async def test_a_deleted_message_is_not_answered(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(system_prompt=tenant.id)
    go = asyncio.Event()
    world.models.script(MODEL, Says("One.", waits=go), Says("Two."))
    first = await tenant.receive(agent, "first", position=1)
    await asked(world, tenant, 1)
    second = await tenant.receive(agent, "second", position=2)
    await tenant.receive(agent, "third", position=3)
    await stored(tenant, 3)
    changes = [await tenant.change(agent, second, None, position=2)]
    # An edit that was made before and comes late.
    changes.append(await tenant.change(agent, second, "secnd", position=2))
    # Of a message that a run has taken: the answer is given, and the text is removed.
    changes.append(await tenant.change(agent, first, None, position=1))
    await handled(tenant, *changes)
    go.set()
    await tenant.runs(2)
    assert of(world, tenant)[1] == ["[The person has deleted this message.]", "One.", "third"]
    # Memory forgets the facts of the message that was answered.
    told = [body for body in await tenant.sent("agent.events") if "said" in body and "reply" not in body]
    assert [(body["message_id"], body["said"]) for body in told] == [(str(first), "")]
    [(messages, of_run)] = await rows(tenant, "SELECT messages, run_messages FROM session WHERE tenant_id = $1", 1)
    assert (messages, of_run) == (3, 1)
    texts = await rows(
        tenant,
        "SELECT convert_from(data, 'UTF8')::jsonb->>'text' = '' FROM event WHERE type = 'MessageAccepted' "
        "AND stream_id LIKE 'session:' || $1 || '/%' ORDER BY version",
        3,
    )
    assert texts == [(True,), (True,), (False,)]


async def test_a_run_whose_message_is_deleted_goes_on_after_an_approval(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(system_prompt=tenant.id, tools=[WEATHER], approval=[WEATHER])
    world.models.script(MODEL, Says(calls=((WEATHER, '{"city":"Bern"}'),)), Says("Wet."))
    message = await tenant.receive(agent, "Bern?")
    await waiting(tenant)
    await handled(tenant, await tenant.change(agent, message, None))
    await tenant.receive(agent, "yes")
    [run] = await tenant.runs(1)
    assert (run["status"], run["reply"]) == ("completed", "Wet.")


async def answered_beside_a_deleted_message(world: World, tenant: Tenant, queue_mode: str) -> None:
    """A second message comes during a run and is deleted before the run's answer."""
    agent = await tenant.agent(system_prompt=tenant.id, queue_mode=queue_mode)
    go = asyncio.Event()
    world.models.script(MODEL, Says("One.", waits=go))
    await tenant.receive(agent, "first")
    await asked(world, tenant, 1)
    second = await tenant.receive(agent, "second")
    await stored(tenant, 2)
    await handled(tenant, await tenant.change(agent, second, None))
    go.set()


async def test_a_run_whose_only_message_was_deleted_is_cancelled(world: World, tenant: Tenant) -> None:
    await answered_beside_a_deleted_message(world, tenant, "followup")
    runs = await tenant.runs(2)
    assert [(run["status"], run["error"]) for run in runs] == [("completed", None), ("cancelled", DELETED)]
    assert [send["text"] for send in await tenant.sent("channel.outbound")] == ["One."]


async def test_a_message_that_joined_a_run_and_is_deleted_costs_no_model_call(world: World, tenant: Tenant) -> None:
    await answered_beside_a_deleted_message(world, tenant, "steer")
    [run] = await tenant.runs(1)
    assert (run["status"], run["reply"]) == ("completed", "One.")
    assert of(world, tenant) == [["first"]]


async def test_no_run_answers_a_deleted_message_that_had_joined_a_run_that_fails(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(system_prompt=tenant.id, queue_mode="steer", tools=[WEATHER])
    go = asyncio.Event()
    world.models.script(MODEL, Says(calls=((WEATHER, '{"city":"Bern"}'),), waits=go), Says(""), Says("Three."))
    await tenant.receive(agent, "first")
    await asked(world, tenant, 1)
    second = await tenant.receive(agent, "second")
    await tenant.receive(agent, "third")
    await stored(tenant, 3)
    await handled(tenant, await tenant.change(agent, second, None))
    go.set()
    failed, answered = await tenant.runs(2)
    assert (failed["status"], answered["reply"]) == ("failed", "Three.")
    assert [messages[-1] for messages in of(world, tenant)[1:]] == ["third", "third"]


@pytest.mark.parametrize("text", ["Rome?", None])
async def test_a_change_waits_for_its_message(world: World, tenant: Tenant, text: str | None) -> None:
    agent = await tenant.agent(system_prompt=tenant.id)
    go = asyncio.Event()
    world.models.script(MODEL, Says("One.", waits=go), *([Says("Two.")] if text else []))
    await tenant.receive(agent, "first", position=1)
    await asked(world, tenant, 1)
    late = await tenant.change(agent, later := uuid7(), text, position=2)
    await tenant.receive(agent, "Bern?", position=2, message_id=later)
    await handled(tenant, late)
    go.set()
    await tenant.runs(2)
    assert of(world, tenant)[1:] == ([["first", "One.", "Rome?"]] if text else [])
