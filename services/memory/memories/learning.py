"""Keeps the facts that rules or a model found in the messages of finished runs, and embeds memories."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from infra.errors import Conflict, EffectFailed, InvalidMessage
from infra.lanes.effects import Effects
from infra.postgres.tx import Tx, derived_id
from infra.security.subjects import Erased
from services.memory.indexes.embed_text import embed_text
from services.memory.indexes.embeddings import Embedder
from services.memory.indexes.models import EmbeddingModels
from services.memory.memories.extraction import Kind, facts, normal
from services.memory.memories.forgetting import is_withdrawn
from services.memory.memories.keeping import RULES, Keeping, New
from services.memory.memories.store import Memories
from services.memory.metering.credit import Credit
from services.memory.metering.usage import of_client

# Of a fact that a rule found in the person's own words.
RULE_CONFIDENCE = 0.8


class FinishedRun(NamedTuple):
    """The finished run in which a person spoke. Place and speaker of all that is learned from it."""

    id: UUID
    subject_id: str
    channel_id: UUID | None
    message_id: str | None
    """The last message of the person."""
    at: datetime


class FoundFact(NamedTuple):
    """A fact that a model found in the person's words."""

    text: str
    kind: Kind
    topic: str | None
    importance: int
    confidence: float
    message_id: str | None
    same_as: UUID | None
    replaces: UUID | None


class Merged(NamedTuple):
    """Memories of the person that a model made into one."""

    parts: Sequence[UUID]
    text: str


class Learning:
    def __init__(self, keeping: Keeping, memories: Memories, models: EmbeddingModels, credit: Credit) -> None:
        self._keeping = keeping
        self._memories = memories
        self._models = models
        self._credit = credit

    async def by_rules(self, tx: Tx, run: FinishedRun, said: str) -> list[UUID]:
        """Keeps the facts that rules find in the person's message. Returns the ids of the new memories; the same run
        always gives the same ids. Keeps nothing of an erased person, nor of a run with a deleted message."""
        found = _found(run, said)
        if await _is_withdrawn(tx, run, found):
            return []
        return await self._keep(tx, run, RULES, found, ())

    async def after_deletion(self, tx: Tx, run: FinishedRun, message_id: UUID | None, said: str) -> list[UUID]:
        """Forgets the facts that were learned from a run with a deleted message, except those that rules find in the
        others. Keeps these, as `by_rules`."""
        found = _found(run, said)
        try:
            await self._keeping.withdraw(tx, run.subject_id, run.id, message_id, [fact.text for fact in found])
        except Erased:
            return []
        return await self._keep(tx, run, RULES, found, ())

    async def by_model(
        self, tx: Tx, run: FinishedRun, model: str, found: Sequence[FoundFact], merged: Sequence[Merged]
    ) -> list[UUID]:
        """As `by_rules`, with the facts that a model found. A merge whose parts have changed meanwhile is left out."""
        if await _is_withdrawn(tx, run, found or merged):
            return []
        return await self._keep(tx, run, model, found, merged)

    async def _keep(
        self, tx: Tx, run: FinishedRun, learned_by: str, found: Sequence[FoundFact], merged: Sequence[Merged]
    ) -> list[UUID]:
        learned = []

        def new(*name: object, text: str, kind: Kind, **fields: Any) -> New:
            return New(
                id=derived_id(run.id, "memory", learned_by, *name),
                # The place comes from the run alone: no text of a person and no answer of a model can choose another.
                scope="user",
                scope_id=run.subject_id,
                subject_id=run.subject_id,
                text=text,
                kind=kind,
                speaker="person",
                at=run.at,
                run_id=run.id,
                channel_id=run.channel_id,
                learned_by=learned_by,
                **fields,
            )

        try:
            for fact in found:
                # Of a run with a deleted message the same facts are found again, in other places.
                memory_id, is_new = await self._keeping.learn(tx, new(normal(fact.text), **fact._asdict()))
                if is_new:
                    learned.append(memory_id)
            for n, merge in enumerate(merged):
                whole = new("merge", n, text=merge.text, kind="fact", topic=None, importance=1, confidence=1.0)
                with suppress(InvalidMessage, Conflict):
                    learned.append(await self._keeping.consolidate(tx, whole, merge.parts))
        except Erased:
            return []
        return learned

    async def embed(self, memory_id: UUID, effects: Effects, tx: Tx) -> None:
        """Embeds the memory, so that it is ranked by its meaning."""
        active = await self._models.active()
        with suppress(EffectFailed):
            await self._fill(memory_id, active, effects, self._credit)
        await self._models.by_target(lambda target: self._fill(memory_id, target, effects))
        await self._models.hold(tx, active.key)

    async def _fill(self, memory_id: UUID, model: Embedder, effects: Effects, credit: Credit | None = None) -> None:
        """Embeds the memory by the model if it was not. credit: for a paid model.

        Raises EffectFailed if the endpoint refuses the text, or the credit does not suffice.
        """
        async with effects.begin() as begun:
            tenant_id = str(begun.tenant_id)
            memory = await self._memories.without_vector(begun, memory_id, model.key)
        if memory is None:
            return
        client = memory.subject_id if memory.speaker == "person" else memory.speaker
        origin = of_client(client, channel_id=memory.channel_id)
        await embed_text(effects, self._models, model, "memory", memory_id, memory.text, tenant_id, origin, credit)


def _found(run: FinishedRun, said: str) -> list[FoundFact]:
    """The facts that rules find in the words of the person."""
    return [
        FoundFact(fact.text, fact.kind, fact.topic, fact.importance, RULE_CONFIDENCE, run.message_id, None, None)
        for fact in (facts(said) if run.subject_id else ())
    ]


async def _is_withdrawn(tx: Tx, run: FinishedRun, learned: Sequence[object]) -> bool:
    # Most runs teach nothing, and need no look.
    return bool(learned) and await is_withdrawn(tx, run.subject_id, run.id)
