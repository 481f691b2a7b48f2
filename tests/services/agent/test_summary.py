"""A conversation that is too long for the model is summarised, once."""

from __future__ import annotations

import pytest

from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys
from protos.catalog import PLATFORM_EVENTS
from protos.messages.user import SubjectErased
from services.agent.execution.conversation import SessionSummary, keep_summary
from tests.services.agent.conftest import MODEL, Tenant, World
from tests.services.agent.test_changes import handled, rows
from tooling.testing.model_server import Fails, Says
from tooling.testing.platform import MASTER_KEY

LONG = "x" * 15_000


async def talk(world: World, tenant: Tenant, agent: str, *texts: str) -> None:
    """Sends the texts one after the other; the model answers answer 0, answer 1, …"""
    for n, text in enumerate(texts):
        world.models.script(MODEL, Says(f"answer {n}"))
        await tenant.over(await tenant.say(agent, text))


async def test_what_is_too_old_is_put_in_short_and_kept_so(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(system_prompt=tenant.id)
    await talk(world, tenant, agent, f"first {LONG}", f"second {LONG}", f"third {LONG}")
    world.models.script(MODEL, Says("They said first."), Says("Yes."))
    run = await tenant.over(await tenant.say(agent, "Do you remember?"))
    assert [step["kind"] for step in run["steps"]] == ["model", "model"]
    asked, answered = world.models.requests[-2:]
    assert asked.last_user_text.startswith(f"Person: first {LONG}")
    assert "Assistant: answer 0" in asked.last_user_text
    assert "third" not in asked.last_user_text
    assert "They said first." in answered.system
    turns = [message["content"] for message in answered.body["messages"][1:]]
    assert turns == [f"third {LONG}", "answer 2", "Do you remember?"]
    # The next run uses the stored summary.
    run = await tenant.over(await tenant.say(agent, "And now?"))
    assert len(run["steps"]) == 1
    assert "They said first." in world.models.requests[-1].system
    assert len(world.models.requests[-1].body["messages"]) == 1 + 5


async def test_a_summary_goes_with_the_words_of_an_erased_person(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(system_prompt=tenant.id)
    for n, (text, person) in enumerate((("first", "person-1"), ("second", "person-1"), ("third", "person-2")), 1):
        world.models.script(MODEL, Says(f"answer {n}"))
        await tenant.receive(agent, f"{text} {LONG}", person=person)
        await tenant.runs(n)
    world.models.script(MODEL, Says("They said first."))
    await tenant.receive(agent, "Next", person="person-2")
    await tenant.runs(4)
    assert "They said first." in world.models.requests[-1].system
    erased = SubjectErased(tenant_id=tenant.id, subject_id="person-1")
    await world.platform.produce(PLATFORM_EVENTS, erased, key=tenant.id, tenant_id=tenant.id)

    async def gone() -> bool:
        async with world.platform.database("agent").begin() as tx:
            rows = await tx.sql(
                "SELECT 1 FROM subject_key WHERE tenant_id = $1 AND subject_id = 'person-1' AND wrapped IS NULL",
                tenant.id,
            )
        return bool(rows)

    await world.platform.until(gone)
    await tenant.receive(agent, "Last", person="person-2")
    await tenant.runs(5)
    assert "They said first." not in world.models.requests[-1].system


async def test_a_summary_goes_with_a_deleted_message(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(system_prompt=tenant.id)
    ids = []
    for n, text in enumerate(("first", "second", "third"), 1):
        world.models.script(MODEL, Says(f"answer {n}"))
        ids.append(await tenant.receive(agent, f"{text} {LONG}", position=n))
        await tenant.runs(n)
    world.models.script(MODEL, Says("They said first."))
    await tenant.receive(agent, "Next", position=4)
    await tenant.runs(4)
    assert "They said first." in world.models.requests[-1].system
    # The summary does not cover the third message: it stays.
    await handled(tenant, await tenant.change(agent, ids[2], None, position=3))
    assert await rows(tenant, "SELECT FROM session WHERE tenant_id = $1 AND summary IS NOT NULL", 1)
    await handled(tenant, await tenant.change(agent, ids[0], None, position=1))
    assert await rows(tenant, "SELECT FROM session WHERE tenant_id = $1 AND summary IS NULL AND summary_seq = 0", 1)
    # A run that began before the deletions keeps no summary: it may have read the first message.
    await keep(tenant, began="- interval '1 hour'")
    assert await rows(tenant, "SELECT FROM session WHERE tenant_id = $1 AND summary IS NULL", 1)
    await keep(tenant, began="+ interval '1 hour'")
    assert await rows(tenant, "SELECT FROM session WHERE tenant_id = $1 AND summary IS NOT NULL", 1)


async def test_a_summary_goes_with_a_message_that_was_edited_after_nothing_answered_it(
    world: World, tenant: Tenant
) -> None:
    agent = await tenant.agent(system_prompt=tenant.id)
    session = f"/api/v1/sessions/{tenant.id}-c"
    await tenant.receive(agent, "before", position=1)
    await tenant.runs(1)
    await tenant.call("POST", f"{session}/takeover")
    edited = await tenant.receive(agent, f"Bern {LONG}", position=2)
    await tenant.runs(2)
    await tenant.call("POST", f"{session}/release")
    for n, text in enumerate(("second", "third"), 3):
        world.models.script(MODEL, Says(f"answer {n}"))
        await tenant.receive(agent, f"{text} {LONG}", position=n)
        await tenant.runs(n)
    world.models.script(MODEL, Says("They live in Bern."))
    await tenant.receive(agent, "Next", position=5)
    await tenant.runs(5)
    assert "They live in Bern." in world.models.requests[-1].system
    await handled(tenant, await tenant.change(agent, edited, f"Rome {LONG}", position=2))
    world.models.script(MODEL, Says("They live in Rome."))
    await tenant.receive(agent, "Where do I live?", position=6)
    await tenant.runs(6)
    summarised, answered = world.models.requests[-2:]
    assert f"Person: Rome {LONG}" in summarised.last_user_text
    assert "They live in Rome." in answered.system
    assert "Bern" not in answered.system


async def keep(tenant: Tenant, *, began: str) -> None:
    """Keeps a summary for a run that began at another time than the last deletion."""
    async with tenant.world.platform.database("agent").begin(tenant_id=tenant.id) as tx:
        [(run_id, session_key)] = await tx.sql(
            f"""
            UPDATE run SET started_at = s.message_deleted_at {began}
            FROM session s
            WHERE run.id = (SELECT id FROM run WHERE tenant_id = $1 ORDER BY id LIMIT 1) AND s.tenant_id = $1
            RETURNING run.id, s.session_key
            """,
            tenant.id,
        )
        key = await SubjectKeys(Cipher(MASTER_KEY)).key(tx, tenant.id, "person-1")
        summary = SessionSummary("They said second.", 2, frozenset())
        await keep_summary(tx, key, "person-1", session_key, run_id, summary)


@pytest.mark.parametrize("failure", [Fails(400), Says(" ")])
async def test_a_model_that_makes_no_summary_is_asked_without_one(
    world: World, tenant: Tenant, failure: Says | Fails
) -> None:
    agent = await tenant.agent(system_prompt=tenant.id)
    await talk(world, tenant, agent, f"first {LONG}", f"second {LONG}", f"third {LONG}")
    world.models.script(MODEL, failure, Says("Fine."))
    run = await tenant.over(await tenant.say(agent, "Go on"))
    assert (run["status"], run["reply"]) == ("completed", "Fine.")
    assert world.models.requests[-1].system == tenant.id
