"""New facts repeat, replace and consolidate memories, and the table follows from the events alone."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import UUID

import pytest

from infra.clock import utcnow, uuid7
from infra.errors import Conflict, InvalidMessage
from infra.postgres.database import Database
from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys, destroy
from infra.service import verification
from infra.service.verification import VerificationResult
from services.memory.memories import forgetting
from services.memory.memories.keeping import Keeping, New
from services.memory.memories.learning import FinishedRun, FoundFact, Learning
from services.memory.memories.read_models import READ_MODELS
from services.memory.memories.store import Memories, Memory
from tests.services.memory.conftest import CREDIT
from tooling.testing.platform import Platform

TENANT = "tenant-of-keeping"
SUBJECTS = SubjectKeys(Cipher("m" * 43 + "="))
BEGAN = datetime(2026, 11, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
async def database(platform: Platform) -> Database:
    await platform.prepare("memory")
    return platform.database("memory")


class Person:
    """A person and all that is known of them."""

    def __init__(self, database: Database) -> None:
        self.id = f"person-{uuid7()}"
        self._database = database
        self._keeping, self._memories = Keeping(SUBJECTS), Memories(SUBJECTS)
        self._learning = Learning(self._keeping, self._memories, cast(Any, None), CREDIT)
        self._seconds = 0

    def new(self, text: str, **fields: Any) -> New:
        self._seconds += 1
        given: dict[str, Any] = {
            "id": uuid7(),
            "scope": "user",
            "scope_id": self.id,
            "subject_id": self.id,
            "kind": "fact",
            "topic": None,
            "importance": 5,
            "confidence": 0.8,
            "speaker": "person",
            "at": BEGAN + timedelta(seconds=self._seconds),
            "run_id": uuid7(),
            "learned_by": "openai/gpt-4o-mini",
        }
        return New(text=text, **given | fields)

    async def says(self, text: str, **fields: Any) -> UUID:
        async with self._database.begin(tenant_id=TENANT) as tx:
            return (await self._keeping.learn(tx, self.new(text, **fields)))[0]

    async def tells(self, *texts: str) -> list[UUID]:
        """Says this; rules find the facts. Returns the ids of the runs."""
        runs = []
        for text in texts:
            self._seconds += 1
            run = FinishedRun(uuid7(), self.id, None, None, BEGAN + timedelta(seconds=self._seconds))
            async with self._database.begin(tenant_id=TENANT) as tx:
                await self._learning.by_rules(tx, run, text)
            runs.append(run.id)
        return runs

    async def merges(self, text: str, *parts: UUID) -> UUID:
        async with self._database.begin(tenant_id=TENANT) as tx:
            return await self._keeping.consolidate(tx, self.new(text), parts)

    async def does(self, act: str, id_: UUID, *arguments: Any, **changed: Any) -> None:
        async with self._database.begin(tenant_id=TENANT) as tx:
            memory = await self._memories.locked(tx, id_, None)
            target = id_ if act == "archive" else memory._replace(**changed)
            await getattr(self._keeping, act)(tx, target, "client", *arguments)

    async def deletes(self, run_id: UUID, left: str = "", message_id: UUID | None = None) -> list[UUID]:
        """Deletes a message of the run; these words are left."""
        run = FinishedRun(run_id, self.id, None, None, BEGAN)
        async with self._database.begin(tenant_id=TENANT) as tx:
            return await self._learning.after_deletion(tx, run, message_id, left)

    async def memories(self) -> list[Memory]:
        async with self._database.begin(tenant_id=TENANT) as tx:
            return await self._memories.newest(tx, 100, None, [self.id], "user", self.id)

    async def in_force(self) -> set[str]:
        return {memory.text for memory in await self.memories() if memory.replaced_by is None}


@pytest.fixture
def person(database: Database) -> Person:
    return Person(database)


async def verified(database: Database, *, switch: bool = False) -> VerificationResult:
    [model] = READ_MODELS
    return await verification.verify(database.engine, "memory", model, switch=switch, restart=True)


async def test_other_words_for_a_known_fact_are_the_same_memory(person: Person) -> None:
    oslo = await person.says("Lives in Oslo.")
    assert await person.says("Her home is in Oslo.", same_as=oslo) == oslo
    [memory] = await person.memories()
    assert (memory.uses, memory.importance, memory.text) == (1, 6, "Lives in Oslo.")


async def test_what_was_learned_from_a_deleted_message_is_forgotten(database: Database, person: Person) -> None:
    run = uuid7()
    oslo = await person.says("Lives in Oslo.")
    await person.says("Lives in Bergen.", replaces=oslo, run_id=run)
    # Said again in another message.
    await person.says("Has a dog.", run_id=run)
    await person.says("Has a dog.")
    tea, milk = await person.says("Likes tea."), await person.says("Likes milk in tea.", run_id=run)
    await person.merges("Likes tea with milk.", tea, milk)
    secret = await person.says("Is on leave.", run_id=run)
    assert await person.in_force() == {"Lives in Bergen.", "Has a dog.", "Likes tea with milk.", "Is on leave."}
    for _ in range(2):
        await person.deletes(run)
        assert await person.in_force() == {"Lives in Oslo.", "Has a dog.", "Likes tea."}
    async with database.begin(tenant_id=TENANT) as tx:
        [(learned,)] = await tx.sql(
            """
            SELECT convert_from(data, 'UTF8')::jsonb->>'text'
            FROM event
            WHERE stream_id = 'memory:' || $1 AND type = 'MemoryLearned'
            """,
            str(secret),
        )
    assert learned == ""
    assert (await verified(database)).differences == []
    # Nothing more is learned from this run, except for the words that are left of it.
    learning = Learning(Keeping(SUBJECTS), Memories(SUBJECTS), cast(Any, None), CREDIT)
    about = FinishedRun(run, person.id, None, None, BEGAN)
    found = FoundFact("Is on leave.", "fact", None, 5, 0.8, None, None, None)
    async with database.begin(tenant_id=TENANT) as tx:
        assert await learning.by_model(tx, about, "m", [found], []) == []
        assert await learning.by_rules(tx, about, "I am allergic to nuts.") == []
    assert len(await person.deletes(run, "I am allergic to nuts.")) == 1


async def test_what_is_learned_again_after_a_deletion_overwrites_no_other_memory(person: Person) -> None:
    [run] = await person.tells("I live in Oslo. I like tea. I like figs.")
    await person.tells("I live in Oslo. I like figs.")
    figs = next(memory.id for memory in await person.memories() if "figs" in memory.text)
    await person.does("change", figs, text="I like ripe figs.")
    # "I live in Oslo." was in the deleted message.
    await person.deletes(run, "I like tea. I like figs.")
    assert await person.in_force() == {"I live in Oslo.", "I like tea.", "I like ripe figs."}


async def test_what_a_person_forgot_or_corrected_does_not_come_back_with_a_deletion(
    database: Database, person: Person
) -> None:
    said = "I like tea. I am allergic to nuts. I live in Oslo. I like figs."
    runs = await person.tells(said, said, f"{said} My name is Ann.")
    ids = {memory.text: memory.id for memory in await person.memories()}
    await person.does("delete", ids["I like tea."])
    await person.does("change", ids["I am allergic to nuts."], text="I am allergic to eggs.")
    await person.does("archive", ids["I live in Oslo."], BEGAN)
    ann, *kept = await person.memories()
    assert [memory.uses for memory in kept] == [2, 2, 2]
    for run, expected in zip(runs, ([ann, *kept], [ann, *kept], kept), strict=True):
        await person.deletes(run, said)
        assert await person.memories() == expected
    assert (await verified(database)).different == 0
    # Said again since.
    await person.says("I like tea.", learned_by="rules", at=utcnow() + timedelta(minutes=1))
    assert "I like tea." in await person.in_force()


async def test_what_a_model_found_and_a_person_forgot_is_not_found_by_rules(person: Person) -> None:
    run, again, other = uuid7(), uuid7(), uuid7()
    nuts = await person.says("Nuts are dangerous.", run_id=run)
    await person.says("Cannot eat nuts.", same_as=nuts, run_id=again)
    await person.says("Lives at the harbour.", run_id=other, topic="home")
    await person.does("delete", nuts)
    await person.does("change", (await person.memories())[0].id, text="Has a flat at the harbour.")
    for each in (run, again, other):
        assert await person.deletes(each, "I am allergic to nuts. I live in Oslo.") == []
    assert await person.in_force() == set()


async def test_a_fact_is_forgotten_with_the_last_message_that_said_it(database: Database, person: Person) -> None:
    first, second, third = await person.tells("I like tea.", "I like tea!", "i like tea. I live in Oslo.")
    for run, uses in ((second, 1), (second, 1), (first, 0)):
        await person.deletes(run)
        assert [memory.uses for memory in await person.memories() if "tea" in memory.text] == [uses]
    await person.deletes(third, "I live in Oslo.")
    assert await person.in_force() == {"I live in Oslo."}
    assert (await verified(database)).different == 0


async def test_a_corrected_fact_of_a_model_is_forgotten_only_with_its_own_message(
    database: Database, person: Person
) -> None:
    run, first, second = uuid7(), uuid7(), uuid7()
    home = await person.says("Lives at the harbour.", run_id=run, message_id=str(first))
    await person.says("Owns a boat.", run_id=run, message_id=str(first))
    await person.does("change", home, text="Has a flat at the harbour.")
    await person.deletes(run, "My home? At the harbour, with my boat.", message_id=second)
    assert await person.in_force() == {"Has a flat at the harbour."}
    await person.deletes(run, message_id=first)
    assert await person.in_force() == set()
    assert (await verified(database)).different == 0


async def test_the_importance_follows_the_messages_that_still_say_the_fact(database: Database, person: Person) -> None:
    async def importance() -> int:
        [memory] = await person.memories()
        return memory.importance

    # Rules give a taste the importance 5.
    runs = await person.tells(*["I like tea."] * 8)
    assert await importance() == 10
    for run, expected in zip(runs[:5], (10, 10, 9, 8, 7), strict=True):
        await person.deletes(run)
        assert await importance() == expected
    [tea] = await person.memories()
    await person.does("change", tea.id, importance=3)
    [later] = await person.tells("I like tea.")
    for run, expected in ((runs[5], 4), (later, 3)):
        await person.deletes(run)
        assert await importance() == expected
    assert (await verified(database)).different == 0


async def test_the_texts_of_forgotten_memories_are_removed_from_their_events(
    database: Database, person: Person
) -> None:
    tea, figs = await person.says("Likes tea."), await person.says("Likes figs.")
    oslo = await person.says("Lives in Oslo.")
    bergen = await person.says("Lives in Bergen.", replaces=oslo)
    whole = await person.merges("Likes tea and figs.", tea, figs)
    await person.does("change", figs, text="Likes ripe figs.")
    await person.does("delete", figs)
    await person.does("delete", bergen)
    async with database.begin(tenant_id=TENANT) as tx:
        rows = await tx.sql(
            """
            SELECT substr(stream_id, 8)::uuid, convert_from(data, 'UTF8')::jsonb->>'text' = ''
            FROM event
            WHERE type IN ('MemoryLearned', 'MemoryChanged') AND substr(stream_id, 8)::uuid = ANY($1::uuid[])
            """,
            [tea, figs, oslo, bergen, whole],
        )
    assert sorted(rows) == sorted([(tea, False), *((id_, True) for id_ in (figs, figs, oslo, bergen, whole))])
    assert (await verified(database)).different == 0


async def test_a_forgotten_fact_gives_its_place_to_the_one_before(person: Person) -> None:
    run = uuid7()
    oslo = await person.says("Lives in Oslo.")
    bergen = await person.says("Lives in Bergen.", replaces=oslo, run_id=run)
    turku = await person.says("Lives in Turku.", replaces=bergen)
    await person.deletes(run)
    assert {memory.id: memory.replaced_by for memory in await person.memories()} == {oslo: turku, turku: None}


async def test_a_contradiction_keeps_the_newer_fact_and_links_the_older(person: Person) -> None:
    oslo = await person.says("Lives in Oslo.")
    bergen = await person.says("Lives in Bergen.", replaces=oslo)
    turku = await person.says("Lives in Turku.", replaces=bergen, at=BEGAN)
    found = {memory.id: memory.replaced_by for memory in await person.memories()}
    # The fact about Turku was said first and is heard last.
    assert found == {oslo: bergen, bergen: None, turku: bergen}


async def test_a_fact_that_is_learned_late_replaces_none_that_was_said_again_since(person: Person) -> None:
    """Runs of several conversations end in any order."""
    for place, day in (("Oslo", 1), ("Oslo", 3), ("Bergen", 2)):
        await person.says(f"She lives in {place}.", topic="home", at=BEGAN + timedelta(days=day))
    assert await person.in_force() == {"She lives in Oslo."}


async def test_facts_of_rules_that_are_both_true_stay(person: Person) -> None:
    await person.tells("I am diabetic. I am vegetarian.", "I am allergic to nuts, milk and eggs.")
    await person.tells("Yes, I am allergic to nuts.", "My name is Ann. Please call me back tomorrow.", "I am vegan.")
    await person.tells("I am not allergic to nuts.")
    assert await person.in_force() == {
        "I am diabetic.",
        "I am vegan.",
        "I am allergic to nuts, milk and eggs.",
        "I am not allergic to nuts.",
        "My name is Ann.",
    }


async def test_a_corrected_memory_is_about_the_topic_of_its_new_text(database: Database, person: Person) -> None:
    await person.tells("I am allergic to nuts. I like tea.")
    oslo = await person.says("Lives in Oslo.", topic="home")
    ids = {memory.text: memory.id for memory in await person.memories()}
    nuts, tea = ids["I am allergic to nuts."], ids["I like tea."]
    await person.does("change", nuts, text="I am allergic to eggs.")
    await person.does("change", oslo, importance=9)
    # Another memory has this topic.
    await person.does("change", tea, text="I moved to Turku.")
    await person.tells("I am not allergic to nuts.", "I moved to Bergen.")
    assert await person.in_force() == {
        "I am allergic to eggs.",
        "I am not allergic to nuts.",
        "I moved to Turku.",
        "I moved to Bergen.",
    }
    await person.tells("I am not allergic to eggs.")
    assert "I am allergic to eggs." not in await person.in_force()
    # A newer fact on one topic does not replace a memory of several parts.
    whole = await person.merges("Walks.", await person.says("I like forests."), await person.says("I like lakes."))
    await person.does("change", whole, text="I like walks, in forests")
    await person.tells("I don't like walks, in forests")
    assert "I like walks, in forests" in await person.in_force()
    assert (await verified(database)).different == 0


async def test_a_memory_without_a_topic_gets_that_of_a_repetition(database: Database, person: Person) -> None:
    await person.says("I live in Oslo.")
    await person.says("I like tea.")
    await person.tells("I live in Oslo.", "I moved to Bergen.", "I do not like tea.", "I like tea.")
    assert await person.in_force() == {"I moved to Bergen.", "I do not like tea.", "I like tea."}
    # A memory of several parts has none.
    boats = await person.merges("I like boats.", await person.says("I like sails."), await person.says("I like oars."))
    await person.tells("I like boats.", "I don't like boats.")
    assert {"I like boats.", "I don't like boats."} <= await person.in_force()
    assert boats in {memory.id for memory in await person.memories()}
    assert (await verified(database)).different == 0


async def test_a_correction_does_not_repeat_a_part_of_another_memory(person: Person) -> None:
    plums, figs = await person.says("Likes plums."), await person.says("Likes figs.", topic="allergy nuts")
    tea = await person.says("Likes tea.")
    whole = await person.merges("Likes plums and figs.", plums, figs)
    with pytest.raises(Conflict):
        await person.does("change", tea, text="Likes plums!")
    await person.does("change", tea, text="I am allergic to nuts.")
    # Otherwise two memories in force would have one text or topic.
    await person.does("divide", whole)
    assert await person.in_force() == {"Likes plums.", "Likes figs.", "I am allergic to nuts."}


async def test_the_opinion_of_a_model_reaches_no_other_place(database: Database, person: Person) -> None:
    other = Person(database)
    theirs = await other.says("Lives in Oslo.")
    tenants = await person.says("We sell lamps.", scope="tenant", scope_id="", subject_id="")
    for id_ in (theirs, tenants):
        await person.says(f"Notes about {id_}.", same_as=id_)
        await person.says(f"More about {id_}.", replaces=id_)
        with pytest.raises(InvalidMessage, match="not a memory of this scope"):
            await person.merges("All of it.", id_, await person.says(f"Some of {id_}."))
    assert [(memory.uses, memory.replaced_by) for memory in await other.memories()] == [(0, None)]
    assert len(await person.in_force()) == 6


async def test_instances_that_find_one_fact_at_once_keep_one_memory(database: Database, person: Person) -> None:
    oslo = await person.says("Lives in Oslo.", topic="home")
    texts = ["Home is Oslo.", "home is OSLO", "Oslo is home.", "Lives in Oslo!"]
    ids = await asyncio.gather(*(person.says(text, same_as=oslo) for text in texts))
    assert set(ids) == {oslo}
    # Without the opinion of a model the normal form of the text decides.
    others = await asyncio.gather(*(person.says(text) for text in ("Likes tea.", "likes TEA", "Likes tea!")))
    assert len(set(others)) == 1
    assert len(await person.in_force()) == 2
    assert (await verified(database)).different == 0


async def test_a_consolidated_memory_stands_for_its_parts_until_one_is_not_true_any_more(person: Person) -> None:
    tea = await person.says("Likes tea.", importance=3, confidence=0.5, topic="taste tea")
    oslo = await person.says("Lives in Oslo.", importance=7, topic="home")
    whole = await person.merges("Lives in Oslo and likes tea.", tea, oslo)
    found = {memory.id: memory for memory in await person.memories()}
    assert (found[whole].importance, round(found[whole].confidence, 4)) == (7, 0.5)
    assert set(found[whole].parts) == {tea, oslo}
    assert (found[tea].replaced_by, found[oslo].replaced_by) == (whole, whole)
    # The text of a part, said again, is not a new memory.
    assert await person.says("likes tea") == whole
    assert await person.says("Drinks tea.", same_as=tea) == whole
    await person.says("Lives in Bergen.", topic="home")
    assert await person.in_force() == {"Likes tea.", "Lives in Bergen."}


async def test_a_consolidation_is_undone_and_its_parts_can_be_corrected_and_deleted(person: Person) -> None:
    tea, oslo = await person.says("Likes tea.", topic="taste"), await person.says("Lives in Oslo.")
    whole = await person.merges("Lives in Oslo and likes tea.", tea, oslo)
    for parts in ((tea, oslo), (whole, await person.says("Likes plums."))):
        with pytest.raises(InvalidMessage, match="parts"):
            await person.merges("All of it.", *parts)
    await person.does("divide", whole)
    assert await person.in_force() == {"Likes tea.", "Lives in Oslo.", "Likes plums."}
    with pytest.raises(Conflict):
        await person.merges("Likes plums!", tea, oslo)
    # A part that is deleted is in no other text any more.
    whole = await person.merges("Lives in Oslo and likes tea.", tea, oslo)
    await person.does("delete", oslo)
    assert await person.in_force() == {"Likes tea.", "Likes plums."}
    # Its topic is its own again.
    await person.says("Hates tea.", topic="taste")
    assert await person.in_force() == {"Hates tea.", "Likes plums."}
    assert whole not in {memory.id for memory in await person.memories()}


async def test_the_events_alone_rebuild_the_memories(database: Database, person: Person) -> None:
    tea, oslo = await person.says("Likes tea.", topic="taste tea"), await person.says("Lives in Oslo.", topic="home")
    await person.says("Lives in Bergen.", topic="home", message_id="m-1", channel_id=uuid7())
    await person.says("likes TEA", same_as=oslo)
    await person.does("restore", oslo)
    await person.does("change", tea, text="Likes green tea.", importance=9, confidence=0.33)
    await person.does("archive", tea, BEGAN)
    away = await person.says("Owns a boat.", expires_at=BEGAN + timedelta(days=36_500))
    plums, figs = await person.says("Likes plums."), await person.says("Likes figs.")
    await person.merges("Likes plums and figs.", plums, figs)
    whole = await person.merges("Lives in two towns.", *[m.id for m in await person.memories() if "Lives" in m.text])
    await person.does("divide", whole)
    await person.does("delete", away)
    erased = Person(database)
    await erased.says("Lives in Oslo.")
    async with database.begin(tenant_id=TENANT) as tx:
        await destroy(tx, TENANT, erased.id)
        await forgetting.erase(tx, TENANT, erased.id)
    before = await verified(database)
    assert before.rows >= 6
    assert (before.rows, before.live_hash, before.different) == (before.rebuilt_rows, before.rebuilt_hash, 0)
    async with database.begin() as tx:
        await tx.sql("UPDATE memory SET importance = 1, recalls = 5 WHERE id = $1", tea)
        await tx.sql("DELETE FROM memory WHERE id = $1", oslo)
    assert (await verified(database)).different == 2
    assert (await verified(database, switch=True)).left == 0
    after = await verified(database)
    assert (after.live_hash, after.different) == (before.live_hash, 0)


async def test_erasure_takes_what_was_made_of_the_persons_memories(database: Database, person: Person) -> None:
    whole = await person.merges("Oslo and tea.", await person.says("Likes tea."), await person.says("Lives in Oslo."))
    async with database.begin(tenant_id=TENANT) as tx:
        await forgetting.erase(tx, TENANT, person.id)
        await destroy(tx, TENANT, person.id)
        assert await tx.sql("SELECT FROM memory WHERE subject_id = $1 OR id = $2", person.id, whole) == []
    assert (await verified(database)).different == 0


async def test_a_memory_that_has_expired_is_in_force_again_if_it_is_said_again(person: Person) -> None:
    boat = await person.says("Owns a boat.", expires_at=BEGAN + timedelta(seconds=1))
    assert await person.in_force() == set()
    assert await person.says("owns a boat") == boat
    assert await person.in_force() == {"Owns a boat."}
