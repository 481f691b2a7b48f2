"""Learns from finished runs, and embeds memories."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from infra.clock import utcnow
from infra.errors import Transient, Unanswered
from infra.lanes.effects import Effects, Outcome
from infra.postgres.tx import Tx, derived_id
from infra.security.subjects import Erased
from protos.messages.agent import RunCompleted
from services.memory import memories
from services.memory.embeddings import Embedded, Embedder
from services.memory.extraction import Fact, facts
from services.memory.memories import Memories, New
from services.memory.usage import record_usage

# Of a fact that a rule found in the person's own words.
RULE_CONFIDENCE = 0.8


class Learning:
    def __init__(self, kept: Memories, embedder: Embedder) -> None:
        self._memories = kept
        self._embedder = embedder

    async def learn(self, tx: Tx, event: RunCompleted) -> list[UUID]:
        """Keeps the facts in the person's message. Returns the ids of the new memories; the same event always gives
        the same ids. Keeps nothing of an erased person."""
        said = facts(event.said) if event.subject_id else []
        try:
            return await self._keep(tx, event, said)
        except Erased:
            return []

    async def _keep(self, tx: Tx, event: RunCompleted, said: Sequence[Fact]) -> list[UUID]:
        at = tx.cause.time if tx.cause else utcnow()
        learned = []
        for n, fact in enumerate(said):
            new = New(
                id=derived_id(event.run_id, "memory", n),
                scope="user",
                scope_id=event.subject_id,
                subject_id=event.subject_id,
                text=fact.text,
                kind=fact.kind,
                topic=fact.topic,
                importance=fact.importance,
                confidence=RULE_CONFIDENCE,
                speaker="person",
                at=at,
                run_id=event.run_id,
                channel_id=event.channel_id,
            )
            memory_id, is_new = await self._memories.learn(tx, new)
            if is_new:
                learned.append(memory_id)
        return learned

    async def embed(self, memory_id: UUID, effects: Effects) -> None:
        """Embeds the memory, so that it is ranked by its meaning."""
        async with effects.begin() as begun:
            text = await self._memories.text(begun, memory_id)
        if text is None:
            return
        made: Embedded | None = None

        async def call(_: str) -> int:
            nonlocal made
            try:
                made = await self._embedder.passages([text])
            except Unanswered as error:
                raise Transient(str(error)) from error
            return made.tokens

        async def keep(tx: Tx, outcome: Outcome[int]) -> None:
            if made is None or outcome.result is None:
                return
            await memories.set_vector(tx, memory_id, self._embedder.model, made.vectors[0])
            # The tenant did not ask for this work, so it is billed only if the platform pays for it.
            if self._embedder.paid:
                usage_id = f"memory/{effects.item_id}/{outcome.attempt}"
                record_usage(tx, self._embedder.model, usage_id, outcome.result)

        await effects.run(f"embed/{effects.item_id}", call, kind="repeatable", result=int, after=keep)
