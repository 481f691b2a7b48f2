"""Writes memories: decides which ones a new fact repeats or replaces, and stores each event with the row after it.

All memories of one place (a scope of a tenant) are written by one transaction at a time, under a lock. So a fact that
two processes hear at once is one memory, and a contradiction finds the fact that it contradicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, get_args
from uuid import UUID

import msgspec

from infra.errors import Conflict, InvalidMessage, NotFound
from infra.postgres.event_store import Aggregate
from infra.postgres.tx import Tx
from infra.postgres.upcasting import EventTypes
from infra.security.crypto import DataKey
from infra.security.subjects import SubjectKeys
from services.memory.memories.events import (
    MAX_IMPORTANCE,
    REINFORCEMENT,
    Event,
    MemoryArchived,
    MemoryChanged,
    MemoryForgotten,
    MemoryLearned,
    MemoryParted,
    MemoryRepeated,
    MemoryReplaced,
    MemoryRestored,
    MemoryWithdrawn,
    Scope,
    State,
    evolve,
)
from services.memory.memories.extraction import Kind, normal, topic_of
from services.memory.memories.forgetting import is_forgotten, mark_forgotten, mark_withdrawn, remove_texts
from services.memory.memories.store import Memory, lock

# One memory is made of at most so many.
MAX_PARTS = 20
RULES = "rules"
"""`New.learned_by` of a fact that rules found."""

MEMORY: Aggregate[State | None] = Aggregate(
    name="memory",
    events=EventTypes(*get_args(Event)),
    initial=lambda: None,
    evolve=evolve,
    # What to append depends on other memories, so `Keeping` decides it.
    decide=lambda command, state: (),
)

# Of another memory.
_SAME_TEXT = "m.digest = $4 AND m.id <> $5"
_FIELDS = State.__struct_fields__
_COLUMNS = ", ".join(_FIELDS)
_PARAMETERS = ", ".join(f"${n}" for n in range(3, len(_FIELDS) + 3))
_NEW_VALUES = ", ".join(f"{name} = excluded.{name}" for name in _FIELDS)


class New(NamedTuple):
    """A fact to remember."""

    id: UUID
    scope: Scope
    scope_id: str
    subject_id: str
    text: str
    kind: Kind
    topic: str | None
    importance: int
    confidence: float
    speaker: str
    at: datetime
    run_id: UUID | None = None
    message_id: str | None = None
    expires_at: datetime | None = None
    channel_id: UUID | None = None
    learned_by: str = ""
    """RULES, or the name of the model that found the fact; empty: a client wrote it."""
    same_as: UUID | None = None
    """A memory that a model takes for the same fact. It has no effect unless it is in force in the same place."""
    replaces: UUID | None = None
    """A memory that the fact contradicts, as a model finds. Under the same condition."""


class _Known(NamedTuple):
    """A memory that a fact repeats or contradicts."""

    id: UUID
    used_at: datetime
    """When it was said last."""
    whole: UUID | None
    """The memory in force that was made of it and others; None: it is in force itself."""


@dataclass
class _Said:
    """The origins of a memory."""

    runs: set[UUID | None]
    """Those that have said it, without those whose message was deleted. None: a client wrote it."""
    digests: set[bytes]
    """Of its texts."""
    given: int
    """The importance with which it was learned, or that a client gave it later."""
    counted: list[UUID | None]
    """The runs that have said it since then. The first stands for `given`."""

    @property
    def importance(self) -> int:
        return min(MAX_IMPORTANCE, self.given + REINFORCEMENT * (len(self.counted) - 1))

    def withdraw(self, run_id: UUID) -> None:
        self.runs.discard(run_id)
        if run_id in self.counted:
            self.counted.remove(run_id)


class Keeping:
    def __init__(self, subjects: SubjectKeys) -> None:
        self._subjects = subjects

    async def learn(self, tx: Tx, new: New) -> tuple[UUID, bool]:
        """The id of the memory with this fact, and whether it is a new one. A fact that was found in words from before
        the person forgot or corrected it gets no memory. Raises Erased."""
        tenant_id = str(tx.tenant_id)
        key = await self._subjects.key(tx, tenant_id, new.subject_id)
        digest = key.digest(normal(new.text))
        topic = key.digest(new.topic) if new.topic else None
        await lock(tx, new.scope, new.scope_id)
        if await self._state(tx, new.id):
            # A client may have corrected it.
            return new.id, False
        origins = [digest, new.run_id.bytes if new.run_id else None]
        if new.learned_by and await is_forgotten(tx, new.scope_id, origins, new.at):
            return new.id, False
        for same in await _known(tx, new, "(m.digest = $4 OR m.id = $5)", digest, new.same_as):
            id_ = same.whole or same.id
            said = await _said(tx, [id_, same.id])
            if new.run_id and any(new.run_id in each.runs for each in said.values()):
                # After a deletion, the words that are left of a run are searched again.
                return id_, False
            # Only one memory in force has the topic: the other one.
            taken = topic and await _known(tx, new, "m.topic = $4 AND m.id <> $5", topic, id_)
            repeated = MemoryRepeated(run_id=new.run_id, at=new.at, topic=None if taken else topic)
            await self._write(tx, id_, repeated)
            return id_, False
        replaced_by = None
        contradicted = await _known(tx, new, "(m.topic = $4 OR m.id = $5)", topic, new.replaces)
        for whole in sorted({other.whole for other in contradicted if other.whole}):
            # Its other parts stay true.
            await self._divide(tx, whole, "")
        for other in contradicted:
            if other.used_at > new.at:
                replaced_by = other.id
            elif await _is_in_force(tx, other.id):
                await self._write(tx, other.id, MemoryReplaced(by=new.id))
        await self._add(tx, key, digest, topic, new, replaced_by=replaced_by)
        return new.id, True

    async def consolidate(self, tx: Tx, new: New, part_ids: Sequence[UUID]) -> UUID:
        """Makes one memory of several small ones of the same place, which agents do not get any more.

        It is as important as the most important of them and as certain as the least certain one. Raises InvalidMessage
        for parts that do not fit, Conflict if another memory says the same, Erased.
        """
        tenant_id = str(tx.tenant_id)
        if not 2 <= len(set(part_ids)) == len(part_ids) <= MAX_PARTS:
            raise InvalidMessage("parts", f"must name from 2 to {MAX_PARTS} different memories")
        key = await self._subjects.key(tx, tenant_id, new.subject_id)
        digest = key.digest(normal(new.text))
        await lock(tx, new.scope, new.scope_id)
        parts = [await self._state(tx, id_) for id_ in part_ids]
        for n, part in enumerate(parts):
            place = part and (part.scope, part.scope_id, part.subject_id)
            if part is None or place != (new.scope, new.scope_id, new.subject_id):
                raise InvalidMessage(f"parts[{n}]", "is not a memory of this scope")
            if part.replaced_by or part.archived_at or part.expires_at:
                raise InvalidMessage(f"parts[{n}]", "is replaced or archived, or it expires")
            if part.parts:
                raise InvalidMessage(f"parts[{n}]", "was made of other memories itself")
        known = [each for each in parts if each]
        if any(same.id not in part_ids for same in await _known(tx, new, "m.digest = $4", digest)):
            raise Conflict("text: another memory says the same")
        for id_ in sorted(part_ids):
            await self._write(tx, id_, MemoryReplaced(by=new.id))
        whole = new._replace(
            importance=max(part.importance for part in known), confidence=min(part.confidence for part in known)
        )
        await self._add(tx, key, digest, None, whole, parts=tuple(part_ids))
        return new.id

    async def divide(self, tx: Tx, memory: Memory, by: str) -> None:
        """Undoes `consolidate`: the parts are in force again, and the memory is gone. Raises Conflict if it was not
        made of parts, or is replaced."""
        await lock(tx, memory.scope, memory.scope_id)
        state = await self._state(tx, memory.id)
        if state is None or not state.parts or state.replaced_by:
            raise Conflict(f"memory {memory.id}: is not made of other memories, or is replaced")
        await self._divide(tx, memory.id, by)

    async def change(self, tx: Tx, memory: Memory, by: str) -> Memory:
        """Stores a corrected memory, and returns it. If it is a part of another memory, that one is divided first.

        Raises Conflict if another memory has the same text, Erased.
        """
        tenant_id = str(tx.tenant_id)
        key = await self._subjects.key(tx, tenant_id, memory.subject_id)
        digest = key.digest(normal(memory.text))
        await lock(tx, memory.scope, memory.scope_id)
        await self._divide_whole_of(tx, memory.id, by)
        state = await self._state(tx, memory.id)
        if state is None:
            raise NotFound(f"memory {memory.id}: does not exist")
        if state.replaced_by is None and await _known(tx, state, _SAME_TEXT, digest, memory.id):
            raise Conflict("text: another memory says the same")
        topic = state.topic
        if digest != state.digest:
            topic = await self._new_topic(tx, key, state, memory)
            await _mark_forgotten(tx, memory.id, state)
        changed = MemoryChanged(
            by=by,
            text=_seal(key, tenant_id, memory.id, memory.text),
            digest=digest,
            topic=topic,
            importance=memory.importance,
            confidence=memory.confidence,
            expires_at=memory.expires_at,
        )
        await self._write(tx, memory.id, changed)
        await tx.sql(
            """
            UPDATE memory
            SET model = NULL, vector = NULL, other_model = NULL, other_vector = NULL
            WHERE id = $1
            """,
            memory.id,
        )
        return memory._replace(replaced_by=state.replaced_by)

    async def _new_topic(self, tx: Tx, key: DataKey, state: State, memory: Memory) -> bytes | None:
        """The topic of a memory with another text."""
        named = topic_of(memory.text)
        # A newer fact on one topic would replace all that a memory of several parts says.
        if named is None or state.parts:
            return None
        topic = key.digest(named)
        # Only one memory in force has the topic: the other one.
        return None if await _known(tx, state, "m.topic = $4 AND m.id <> $5", topic, memory.id) else topic

    async def archive(self, tx: Tx, id_: UUID, by: str, at: datetime) -> None:
        """Puts the memory away. It is in force again if the person says it again."""
        await self._write(tx, id_, MemoryArchived(by=by, at=at))

    async def restore(self, tx: Tx, memory: Memory, by: str) -> None:
        """Takes the memory back from the archive, and puts one that was replaced in force beside the newer one. Raises
        Conflict if another memory in force has the same text."""
        await lock(tx, memory.scope, memory.scope_id)
        await self._divide_whole_of(tx, memory.id, by)
        state = await self._state(tx, memory.id)
        if state and state.replaced_by and await _known(tx, state, _SAME_TEXT, state.digest, memory.id):
            raise Conflict("archived: another memory says the same")
        await self._write(tx, memory.id, MemoryRestored(by=by))

    async def delete(self, tx: Tx, memory: Memory, by: str) -> None:
        """Deletes the memory, and the older ones that it replaced or was made of. If it is a part of another memory,
        that one is divided first: its text would still have the forgotten fact."""
        await lock(tx, memory.scope, memory.scope_id)
        await self._divide_whole_of(tx, memory.id, by)
        rows = await tx.sql(
            """
            WITH RECURSIVE older AS (
                SELECT id FROM memory WHERE id = $1
                UNION
                SELECT memory.id FROM memory JOIN older ON memory.replaced_by = older.id
            )
            SELECT id FROM older ORDER BY id
            """,
            memory.id,
        )
        for (row_id,) in rows:
            if state := await self._state(tx, row_id):
                await _mark_forgotten(tx, row_id, state)
                await self._forget(tx, row_id, by)

    async def withdraw(
        self, tx: Tx, subject_id: str, run_id: UUID, message_id: UUID | None, left: Sequence[str]
    ) -> None:
        """Forgets the facts that only a run with a deleted message has said. A fact that a forgotten one had replaced
        is in force again. From now on `is_withdrawn` is true of this run.

        left: the facts that rules find in the other messages of the run. Their memories stay as they are, also if they
        were corrected. So does a corrected one that a model found in another message than `message_id`. Raises Erased.
        """
        await lock(tx, "user", subject_id)
        await mark_withdrawn(tx, run_id)
        key = await self._subjects.key(tx, str(tx.tenant_id), subject_id)
        stated = {key.digest(normal(text)) for text in left}
        rows = await tx.sql(
            """
            SELECT id
            FROM memory
            WHERE tenant_id = $1 AND (run_id = $2 OR (scope = 'user' AND scope_id = $3))
            ORDER BY id
            """,
            tx.tenant_id,
            run_id,
            subject_id,
        )
        for id_, said in (await _said(tx, [id_ for (id_,) in rows])).items():
            state = await self._state(tx, id_) if run_id in said.runs else None
            # It is gone if it was divided with another one.
            if state is None or stated & {state.digest, *said.digests}:
                continue
            # The person wrote the text. An uncorrected one may have words of all messages.
            is_corrected = len(said.digests) > 1
            if is_corrected and state.run_id == run_id and _is_of_other(state, message_id):
                continue
            if said.runs != {run_id}:
                said.withdraw(run_id)
                await self._write(tx, id_, MemoryWithdrawn(run_id=run_id, importance=said.importance))
                continue
            await self._divide_whole_of(tx, id_, "")
            if state.parts:
                await self._divide(tx, id_, "")
            else:
                await self._take_back(tx, id_, state)

    async def _take_back(self, tx: Tx, id_: UUID, state: State) -> None:
        """Forgets a memory. The newest one that it had replaced takes its place, and replaces the others."""
        older = await tx.sql("SELECT id FROM memory WHERE replaced_by = $1 ORDER BY said_at DESC, id DESC", id_)
        await self._forget(tx, id_, "")
        follower = state.replaced_by
        for n, (other,) in enumerate(older):
            if n or follower:
                await self._write(tx, other, MemoryReplaced(by=follower or older[0][0]))
            else:
                await self._write(tx, other, MemoryRestored(by=""))

    async def _divide_whole_of(self, tx: Tx, id_: UUID, by: str) -> None:
        """If the memory is a part of another one, the other one is divided."""
        rows = await tx.sql(
            "SELECT w.id FROM memory m JOIN memory w ON w.id = m.replaced_by WHERE m.id = $1 AND m.id = ANY(w.parts)",
            id_,
        )
        for (whole,) in rows:
            await self._divide(tx, whole, by)

    async def _divide(self, tx: Tx, whole: UUID, by: str) -> None:
        parts = await tx.sql("SELECT id FROM memory WHERE replaced_by = $1 ORDER BY id", whole)
        # First: a part may say the same as the whole.
        await self._forget(tx, whole, by)
        for (id_,) in parts:
            await self._write(tx, id_, MemoryParted())

    async def _forget(self, tx: Tx, id_: UUID, by: str) -> None:
        await self._write(tx, id_, MemoryForgotten(by=by))
        await remove_texts(tx, MEMORY, id_)

    async def _add(
        self,
        tx: Tx,
        key: DataKey,
        digest: bytes,
        topic: bytes | None,
        new: New,
        *,
        parts: tuple[UUID, ...] = (),
        replaced_by: UUID | None = None,
    ) -> None:
        learned = MemoryLearned(
            scope=new.scope,
            scope_id=new.scope_id,
            subject_id=new.subject_id,
            kind=new.kind,
            text=_seal(key, str(tx.tenant_id), new.id, new.text),
            digest=digest,
            topic=topic,
            importance=new.importance,
            confidence=new.confidence,
            speaker=new.speaker,
            learned_by=new.learned_by,
            run_id=new.run_id,
            message_id=new.message_id,
            at=new.at,
            expires_at=new.expires_at,
            channel_id=new.channel_id,
            parts=parts,
        )
        await self._write(tx, new.id, learned, *([MemoryReplaced(by=replaced_by)] if replaced_by else []))

    async def _write(self, tx: Tx, id_: UUID, *events: Event) -> None:
        """Stores the events, and the row as the last of them leaves it: one topic has one memory in force, so the row
        of a fact that is older than the one in force never stands there as if it were in force."""
        state = await self._state(tx, id_)
        for event in events:
            state = evolve(state, event)
            tx.append(MEMORY.stream(str(id_)), event)
        await _store(tx, id_, state)

    async def _state(self, tx: Tx, id_: UUID) -> State | None:
        # Locks the memory until its new state is stored.
        rows = await tx.sql(f"SELECT {_COLUMNS} FROM memory WHERE id = $1 FOR UPDATE", id_)
        return _state_of(rows[0]) if rows else None


def _state_of(row: Sequence[Any]) -> State:
    """The state in a row of `_COLUMNS`."""
    fields = dict(zip(_FIELDS, row, strict=True))
    return State(**fields | {"parts": tuple(fields["parts"])})


async def _store(tx: Tx, id_: UUID, state: State | None) -> None:
    """Writes the row of a memory in this state; None: it has none."""
    if state is None:
        await tx.sql("DELETE FROM memory WHERE id = $1", id_)
        return
    values = msgspec.structs.asdict(state) | {"parts": list(state.parts)}
    await tx.sql(
        f"""
        INSERT INTO memory (id, tenant_id, {_COLUMNS})
        VALUES ($1, $2, {_PARAMETERS})
        ON CONFLICT (id) DO UPDATE SET {_NEW_VALUES}
        """,
        id_,
        tx.tenant_id,
        *values.values(),
    )


async def _known(tx: Tx, place: New | State, condition: str, *arguments: Any) -> list[_Known]:
    """The memories of the place that fulfil the condition, if they are in force or a part of one in force."""
    rows = await tx.sql(
        f"""
        SELECT m.id, m.used_at, w.id
        FROM memory m
        LEFT JOIN memory w ON w.id = m.replaced_by AND m.id = ANY(w.parts) AND w.replaced_by IS NULL
        WHERE m.tenant_id = $1 AND m.scope = $2 AND m.scope_id = $3 AND {condition}
            AND (m.replaced_by IS NULL OR w.id IS NOT NULL)
        ORDER BY m.id
        """,
        tx.tenant_id,
        place.scope,
        place.scope_id,
        *arguments,
    )
    return [_Known(*row) for row in rows]


async def _mark_forgotten(tx: Tx, id_: UUID, state: State) -> None:
    """Words from before now do not bring this fact back."""
    if state.scope != "user":
        return
    facts = {state.digest}
    if state.learned_by not in ("", RULES):
        # Rules find the person's own sentence in such a run, which has other words.
        facts |= {run_id.bytes for said in (await _said(tx, [id_])).values() for run_id in said.runs if run_id}
    await mark_forgotten(tx, state.scope_id, facts)


async def _said(tx: Tx, ids: Sequence[UUID]) -> Mapping[UUID, _Said]:
    """How each of the memories was said, by its id."""
    rows = await tx.sql(
        """
        SELECT stream_id, type, schema_version, data
        FROM event
        WHERE stream_id = ANY($1::text[])
            AND type IN ('MemoryLearned', 'MemoryChanged', 'MemoryRepeated', 'MemoryWithdrawn')
        ORDER BY stream_id, version
        """,
        [f"{MEMORY.name}:{id_}" for id_ in ids],
    )
    found: dict[UUID, _Said] = {}
    for stream_id, *stored in rows:
        id_ = UUID(stream_id.removeprefix(f"{MEMORY.name}:"))
        match MEMORY.events.decode(*stored):
            case MemoryLearned() as event:
                # Of one that was forgotten and learned again, only the last beginning counts.
                found[id_] = _Said({event.run_id}, {event.digest}, event.importance, [event.run_id])
            case MemoryChanged() as event:
                found[id_].digests.add(event.digest)
                if event.importance != found[id_].importance:
                    found[id_].given, found[id_].counted = event.importance, [None]
            case MemoryRepeated() as event:
                found[id_].runs.add(event.run_id)
                found[id_].counted.append(event.run_id)
            case MemoryWithdrawn() as event:
                found[id_].withdraw(event.run_id)
    return found


def _is_of_other(state: State, message_id: UUID | None) -> bool:
    """Whether a model found the memory in another message of its run. Rules do not know the message."""
    return state.learned_by not in ("", RULES) and state.message_id not in (None, str(message_id))


async def _is_in_force(tx: Tx, id_: UUID) -> bool:
    return bool(await tx.sql("SELECT FROM memory WHERE id = $1 AND replaced_by IS NULL", id_))


def _seal(key: DataKey, tenant_id: str, id_: UUID, text: str) -> bytes:
    return key.seal(text, tenant_id, str(id_), "text")
