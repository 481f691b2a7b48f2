"""Memories: facts about people and notes of tenants, as events with their origin, and the table that is read.

The same fact twice is one memory. Of two facts on one topic the newer one is kept, and the older one names it. Texts
are sealed under the key of the person, so that they are gone when the person is erased.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple, get_args
from uuid import UUID

import msgspec
import numpy as np
from numpy.typing import NDArray

from infra.errors import Conflict, NotFound
from infra.postgres.event_store import Aggregate, Stream
from infra.postgres.tx import Tx
from infra.postgres.upcasting import EventTypes
from infra.security.crypto import DataKey
from infra.security.subjects import SubjectKeys
from services.memory.domain import count_tokens
from services.memory.extraction import Kind, normal

Scope = Literal["tenant", "agent", "user", "session"]
HALF_LIFE = timedelta(days=30)
# The part of a prompt that memories may take.
TOKENS = 300
# The most memories of one reader that are ranked: the most important and the newest.
RANKED = 500
# A fact that is said again gains so much importance.
REINFORCEMENT = 1


class MemoryLearned(msgspec.Struct, frozen=True, kw_only=True):
    """A person said a fact, or a client noted it."""

    scope: Scope
    scope_id: str
    subject_id: str
    kind: Kind
    text: bytes
    """Sealed under the subject's key."""
    importance: int
    confidence: float
    speaker: str
    run_id: UUID | None
    message_id: str | None
    at: datetime
    expires_at: datetime | None
    channel_id: UUID | None = None


class MemoryRepeated(msgspec.Struct, frozen=True, kw_only=True):
    """The same fact was said again."""

    run_id: UUID | None
    at: datetime


class MemoryChanged(msgspec.Struct, frozen=True, kw_only=True):
    """A client corrected the memory."""

    by: str
    text: bytes
    """Sealed."""
    importance: int
    confidence: float
    expires_at: datetime | None


class MemoryReplaced(msgspec.Struct, frozen=True, kw_only=True):
    """A newer fact contradicts it."""

    by: UUID


class MemoryArchived(msgspec.Struct, frozen=True, kw_only=True):
    """A client put the memory away: agents do not get it any more."""

    by: str
    at: datetime


class MemoryRestored(msgspec.Struct, frozen=True, kw_only=True):
    """A client took the memory back from the archive, or undid that a newer fact replaced it."""

    by: str


class MemoryForgotten(msgspec.Struct, frozen=True, kw_only=True):
    """A client deleted the memory."""

    by: str


Event = (
    MemoryLearned | MemoryRepeated | MemoryChanged | MemoryReplaced | MemoryArchived | MemoryRestored | MemoryForgotten
)
MEMORY: Aggregate[None] = Aggregate(
    name="memory",
    events=EventTypes(*get_args(Event)),
    initial=lambda: None,
    # The table is the state: an event is written with it.
    evolve=lambda state, event: None,
    decide=lambda command, state: (),
)


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


class Memory(NamedTuple):
    id: UUID
    text: str
    scope: Scope
    scope_id: str
    subject_id: str
    kind: Kind
    importance: int
    confidence: float
    speaker: str
    run_id: UUID | None
    message_id: str | None
    said_at: datetime
    uses: int
    used_at: datetime
    expires_at: datetime | None
    replaced_by: UUID | None
    archived_at: datetime | None
    channel_id: UUID | None
    """The channel in which it was said; None: by the API."""


class Reader(NamedTuple):
    """The person, agent and session whose memories are read. Empty: none of that scope."""

    subject_id: str = ""
    agent_id: str = ""
    session_key: str = ""


class Recalled(NamedTuple):
    memory: Memory
    similarity: float | None
    """The cosine to the query; None if one of them has no vector."""


def id_of(text: str) -> UUID:
    """Raises NotFound for a text that is not an id."""
    try:
        return UUID(text)
    except ValueError:
        raise NotFound(f"memory {text}: does not exist") from None


class Memories:
    def __init__(self, subjects: SubjectKeys) -> None:
        self._subjects = subjects

    async def learn(self, tx: Tx, new: New) -> tuple[UUID, bool]:
        """The id of the memory with this fact, and whether it is a new one. Raises Erased."""
        tenant_id = str(tx.tenant_id)
        key = await self._subjects.key(tx, tenant_id, new.subject_id)
        digest = key.digest(normal(new.text))
        topic = key.digest(new.topic) if new.topic else None
        place = tenant_id, new.scope, new.scope_id
        await _lock(tx, new.scope, new.scope_id)
        same = await tx.sql(
            """
            UPDATE memory
            SET uses = uses + 1, importance = least(10, importance + $6), used_at = greatest(used_at, $5),
                archived_at = NULL
            WHERE tenant_id = $1 AND scope = $2 AND scope_id = $3 AND digest = $4 AND replaced_by IS NULL
            RETURNING id
            """,
            *place,
            digest,
            new.at,
            REINFORCEMENT,
        )
        if same:
            tx.append(_stream(same[0][0]), MemoryRepeated(run_id=new.run_id, at=new.at))
            return same[0][0], False
        replaced_by = None
        if topic:
            rows = await tx.sql(
                """
                SELECT id, said_at
                FROM memory
                WHERE tenant_id = $1 AND scope = $2 AND scope_id = $3 AND topic = $4 AND replaced_by IS NULL
                """,
                *place,
                topic,
            )
            for other_id, said_at in rows:
                if said_at > new.at:
                    replaced_by = other_id
                else:
                    await tx.sql("UPDATE memory SET replaced_by = $2 WHERE id = $1", other_id, new.id)
                    tx.append(_stream(other_id), MemoryReplaced(by=new.id))
        sealed = _seal(key, tenant_id, new.id, new.text)
        await tx.sql(
            """
            INSERT INTO memory (id, tenant_id, scope, scope_id, subject_id, kind, sealed, digest, topic, importance,
                confidence, speaker, run_id, message_id, said_at, used_at, expires_at, replaced_by, channel_id)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $15, $16, $17, $18)
            """,
            new.id,
            *place,
            new.subject_id,
            new.kind,
            sealed,
            digest,
            topic,
            new.importance,
            new.confidence,
            new.speaker,
            new.run_id,
            new.message_id,
            new.at,
            new.expires_at,
            replaced_by,
            new.channel_id,
        )
        learned = MemoryLearned(
            scope=new.scope,
            scope_id=new.scope_id,
            subject_id=new.subject_id,
            kind=new.kind,
            text=sealed,
            importance=new.importance,
            confidence=new.confidence,
            speaker=new.speaker,
            run_id=new.run_id,
            message_id=new.message_id,
            at=new.at,
            expires_at=new.expires_at,
            channel_id=new.channel_id,
        )
        tx.append(_stream(new.id), learned)
        if replaced_by:
            tx.append(_stream(new.id), MemoryReplaced(by=replaced_by))
        return new.id, True

    async def get(self, tx: Tx, id_: UUID, names: Sequence[str] | None, *, lock: bool = False) -> Memory:
        """Raises NotFound, also for a memory of a person who is not among `names`; None: an administrator."""
        rows = await tx.sql(
            f"SELECT {_COLUMNS} FROM memory WHERE {_VISIBLE} AND id = $2 {'FOR UPDATE' if lock else ''}",
            _array(names),
            id_,
        )
        if not rows:
            raise NotFound(f"memory {id_}: does not exist")
        return (await self._opened(tx, rows))[0]

    async def newest(
        self,
        tx: Tx,
        limit: int,
        before: tuple[datetime, UUID] | None,
        names: Sequence[str] | None,
        scope: Scope | None,
        scope_id: str | None,
    ) -> list[Memory]:
        """The newest memories first, after the one that `before` names by time and id."""
        at, id_ = before or (None, None)
        rows = await tx.sql(
            f"""
            SELECT {_COLUMNS}
            FROM memory
            WHERE {_VISIBLE}
                AND ($3::timestamptz IS NULL OR (said_at, id) < ($3, $4::uuid))
                AND ($5::text IS NULL OR scope = $5)
                AND ($6::text IS NULL OR scope_id = $6)
            ORDER BY said_at DESC, id DESC
            LIMIT $2
            """,
            _array(names),
            limit,
            at,
            id_,
            scope,
            scope_id,
        )
        return await self._opened(tx, rows)

    async def change(self, tx: Tx, memory: Memory, by: str) -> None:
        """Stores a corrected memory. Raises Conflict if another memory has the same text."""
        tenant_id = str(tx.tenant_id)
        key = await self._subjects.key(tx, tenant_id, memory.subject_id)
        digest = key.digest(normal(memory.text))
        await _lock(tx, memory.scope, memory.scope_id)
        if memory.replaced_by is None and await tx.sql(
            """
            SELECT id
            FROM memory
            WHERE tenant_id = $1 AND scope = $2 AND scope_id = $3 AND digest = $4 AND replaced_by IS NULL AND id <> $5
            """,
            tenant_id,
            memory.scope,
            memory.scope_id,
            digest,
            memory.id,
        ):
            raise Conflict("text: another memory says the same")
        sealed = _seal(key, tenant_id, memory.id, memory.text)
        await tx.sql(
            """
            UPDATE memory
            SET sealed = $2, digest = $3, importance = $4, confidence = $5, expires_at = $6, model = NULL, vector = NULL
            WHERE id = $1
            """,
            memory.id,
            sealed,
            digest,
            memory.importance,
            memory.confidence,
            memory.expires_at,
        )
        changed = MemoryChanged(
            by=by,
            text=sealed,
            importance=memory.importance,
            confidence=memory.confidence,
            expires_at=memory.expires_at,
        )
        tx.append(_stream(memory.id), changed)

    async def archive(self, tx: Tx, id_: UUID, by: str, at: datetime) -> None:
        """Puts the memory away. It is in force again if the person says it again."""
        await tx.sql("UPDATE memory SET archived_at = $2 WHERE id = $1", id_, at)
        tx.append(_stream(id_), MemoryArchived(by=by, at=at))

    async def restore(self, tx: Tx, memory: Memory, by: str) -> None:
        """Takes the memory back from the archive, and puts one that was replaced in force beside the newer one. Raises
        Conflict if another memory in force has the same text."""
        await _lock(tx, memory.scope, memory.scope_id)
        if memory.replaced_by and await tx.sql(
            """
            SELECT other.id
            FROM memory
            JOIN memory other USING (tenant_id, scope, scope_id, digest)
            WHERE memory.id = $1 AND other.id <> $1 AND other.replaced_by IS NULL
            """,
            memory.id,
        ):
            raise Conflict("archived: another memory says the same")
        await tx.sql(
            """
            UPDATE memory
            -- Only one memory in force has the topic: the newer one.
            SET archived_at = NULL, topic = CASE WHEN replaced_by IS NULL THEN topic END, replaced_by = NULL
            WHERE id = $1
            """,
            memory.id,
        )
        tx.append(_stream(memory.id), MemoryRestored(by=by))

    async def delete(self, tx: Tx, id_: UUID, by: str) -> None:
        """Deletes the memory, and the older ones that it replaced."""
        rows = await tx.sql(
            """
            WITH RECURSIVE older AS (
                SELECT id FROM memory WHERE id = $1
                UNION
                SELECT memory.id FROM memory JOIN older ON memory.replaced_by = older.id
            )
            DELETE FROM memory
            WHERE id IN (SELECT id FROM older)
            RETURNING id
            """,
            id_,
        )
        for (row_id,) in rows:
            tx.append(_stream(row_id), MemoryForgotten(by=by))

    async def recall(self, tx: Tx, reader: Reader, vector: NDArray[np.float32] | None, model: str) -> list[Recalled]:
        """The reader's memories that fit into TOKENS, the most useful first: near to the query, important, and used
        lately. Each of them counts as used."""
        rows = await tx.sql(
            f"""
            SELECT
                {_COLUMNS},
                CASE WHEN model = $5 THEN vector END,
                0.5 ^ (extract(epoch FROM clock_timestamp() - used_at) / $6)
            FROM memory
            WHERE tenant_id = $1
                AND replaced_by IS NULL
                AND archived_at IS NULL
                AND (expires_at IS NULL OR expires_at > clock_timestamp())
                AND (scope = 'tenant'
                    OR (scope = 'user' AND scope_id = $2)
                    OR (scope = 'agent' AND scope_id = $3)
                    OR (scope = 'session' AND scope_id = $4))
            ORDER BY importance DESC, said_at DESC, id
            LIMIT {RANKED}
            """,
            tx.tenant_id,
            reader.subject_id,
            reader.agent_id,
            reader.session_key,
            model,
            HALF_LIFE.total_seconds(),
        )
        if not rows:
            return []
        fresh = {row[0]: float(row[-1]) for row in rows}
        vectors = {row[0]: np.frombuffer(row[-2], dtype="<f4") for row in rows if row[-2] is not None}
        similarities = {} if vector is None else {id_: _cosine(vector, other) for id_, other in vectors.items()}

        def worth(memory: Memory) -> float:
            return similarities.get(memory.id, 0.7) + 0.02 * memory.importance + 0.1 * fresh[memory.id]

        chosen: list[Recalled] = []
        left = TOKENS
        for memory in sorted(await self._opened(tx, [row[:-2] for row in rows]), key=lambda each: -worth(each)):
            tokens = count_tokens(memory.text)
            if tokens <= left:
                chosen.append(Recalled(memory, similarities.get(memory.id)))
                left -= tokens
        await tx.sql(
            """
            -- Locks the rows in the order of their ids: two searches for one person do not deadlock.
            UPDATE memory
            SET uses = uses + 1, used_at = clock_timestamp()
            WHERE id IN (SELECT id FROM memory WHERE id = ANY($1::uuid[]) ORDER BY id FOR UPDATE)
            """,
            [each.memory.id for each in chosen],
        )
        return chosen

    async def text(self, tx: Tx, id_: UUID) -> str | None:
        """The text of a memory that has no vector of its own yet; None if it is gone."""
        rows = await tx.sql(f"SELECT {_COLUMNS} FROM memory WHERE id = $1", id_)
        opened = await self._opened(tx, rows)
        return opened[0].text if opened else None

    async def _opened(self, tx: Tx, rows: Sequence[Sequence[Any]]) -> list[Memory]:
        """The memories with their texts, without those of erased people."""
        tenant_id = str(tx.tenant_id)
        keys = await self._subjects.keys(tx, {(tenant_id, row[4]) for row in rows}) if rows else {}
        opened = []
        for id_, sealed, *rest in rows:
            if key := keys[tenant_id, rest[2]]:
                opened.append(Memory(id_, key.open(sealed, tenant_id, str(id_), "text"), *rest))
        return opened


async def set_vector(tx: Tx, id_: UUID, model: str, vector: NDArray[np.float32]) -> None:
    await tx.sql("UPDATE memory SET model = $2, vector = $3 WHERE id = $1", id_, model, vector.tobytes())


async def erase(tx: Tx, tenant_id: str, subject_id: str) -> None:
    """Deletes everything that was learned from an erased person."""
    await tx.sql(
        """
        DELETE FROM memory
        WHERE tenant_id = $1 AND (subject_id = $2 OR (scope = 'user' AND scope_id = $2))
        """,
        tenant_id,
        subject_id,
    )


_COLUMNS = """
    id, sealed, scope, scope_id, subject_id, kind, importance, confidence, speaker, run_id, message_id, said_at, uses,
    used_at, expires_at, replaced_by, archived_at, channel_id
"""
# $1: the names of the client, or NULL for an administrator.
_VISIBLE = """
    ($1::text[] IS NULL OR scope = 'tenant' OR (scope = 'user' AND scope_id = ANY($1)))
    AND (expires_at IS NULL OR expires_at > clock_timestamp())
"""


async def _lock(tx: Tx, scope: Scope, scope_id: str) -> None:
    """One transaction at a time writes the memories of a person: another one that has the same fact, or one that
    contradicts it, waits here and then finds it."""
    place = " ".join((str(tx.tenant_id), scope, scope_id))
    await tx.sql("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"memory {place}")


def _stream(id_: UUID) -> Stream[None]:
    return MEMORY.stream(str(id_))


def _seal(key: DataKey, tenant_id: str, id_: UUID, text: str) -> bytes:
    return key.seal(text, tenant_id, str(id_), "text")


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _array(values: Sequence[str] | None) -> list[str] | None:
    return None if values is None else list(values)
