"""Reads memories: facts about people and notes of tenants, each with its origin.

Texts are sealed under the key of the person, so that they are gone when the person is erased.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from infra.errors import NotFound
from infra.postgres.tx import Tx
from infra.security.subjects import SubjectKeys
from services.memory.domain import count_tokens
from services.memory.indexes import vectors
from services.memory.memories.events import Scope
from services.memory.memories.extraction import Kind

HALF_LIFE = timedelta(days=30)
# The part of a prompt that memories may take.
TOKENS = 300
# The most memories of one scope that are ranked: the most important and the newest.
RANKED = 500


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
    """How often it was said again or given to an agent."""
    used_at: datetime
    expires_at: datetime | None
    replaced_by: UUID | None
    archived_at: datetime | None
    channel_id: UUID | None
    """The channel in which it was said; None: by the API."""
    learned_by: str
    """``rules``, or the name of the model that found the fact; empty: a client wrote it."""
    parts: Sequence[UUID]
    """The memories that became this one."""


class MemoryScope(NamedTuple):
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

    async def get(self, tx: Tx, id_: UUID, names: Sequence[str] | None) -> Memory:
        """Raises NotFound, also for a memory of a person who is not among `names`; None: an administrator."""
        rows = await tx.sql(f"SELECT {_COLUMNS} FROM memory WHERE {_VISIBLE} AND id = $2", _array(names), id_)
        opened = await self._opened(tx, rows)
        if not opened:
            raise NotFound(f"memory {id_}: does not exist")
        return opened[0]

    async def locked(self, tx: Tx, id_: UUID, names: Sequence[str] | None) -> Memory:
        """As `get`, for a caller that changes the memory in this transaction."""
        memory = await self.get(tx, id_, names)
        await lock(tx, memory.scope, memory.scope_id)
        return await self.get(tx, id_, names)

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

    async def recall(
        self, tx: Tx, scope: MemoryScope, vector: NDArray[np.float32] | None, model: str
    ) -> list[Recalled]:
        """The scope's memories that fit into TOKENS, the most useful first: near to the query, important, and used
        lately. Each of them counts as used."""
        rows = await tx.sql(
            f"""
            SELECT
                {_COLUMNS},
                {vectors.of("$5", "memory")},
                0.5 ^ (extract(epoch FROM clock_timestamp() - greatest(used_at, recalled_at)) / $6)
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
            scope.subject_id,
            scope.agent_id,
            scope.session_key,
            model,
            HALF_LIFE.total_seconds(),
        )
        if not rows:
            return []
        fresh = {row[0]: float(row[-1]) for row in rows}
        others = {row[0]: np.frombuffer(row[-2], dtype="<f4") for row in rows if row[-2] is not None}
        similarities = {} if vector is None else {id_: _cosine(vector, other) for id_, other in others.items()}

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
            -- Leaves out rows that are being changed: it waits for no other transaction.
            UPDATE memory
            SET recalls = recalls + 1, recalled_at = clock_timestamp()
            WHERE id IN (SELECT id FROM memory WHERE id = ANY($1::uuid[]) ORDER BY id FOR UPDATE SKIP LOCKED)
            """,
            [each.memory.id for each in chosen],
        )
        return chosen

    async def without_vector(self, tx: Tx, id_: UUID, model: str) -> Memory | None:
        """A memory that has no vector of the model yet; None if it has one, or is gone."""
        rows = await tx.sql(
            f"SELECT {_COLUMNS} FROM memory WHERE id = $1 AND {vectors.of('$2', 'memory')} IS NULL", id_, model
        )
        opened = await self._opened(tx, rows)
        return opened[0] if opened else None

    async def _opened(self, tx: Tx, rows: Sequence[Sequence[Any]]) -> list[Memory]:
        """The memories with their texts, without those of erased people."""
        tenant_id = str(tx.tenant_id)
        keys = await self._subjects.keys(tx, {(tenant_id, row[4]) for row in rows}) if rows else {}
        opened = []
        for id_, sealed, *rest in rows:
            if key := keys[tenant_id, rest[2]]:
                opened.append(Memory(id_, key.open(sealed, tenant_id, str(id_), "text"), *rest))
        return opened


_COLUMNS = """
    id, sealed, scope, scope_id, subject_id, kind, importance, confidence, speaker, run_id, message_id, said_at,
    uses + recalls, greatest(used_at, recalled_at), expires_at, replaced_by, archived_at, channel_id, learned_by, parts
"""
# $1: the names of the client, or NULL for an administrator.
_VISIBLE = """
    ($1::text[] IS NULL OR scope = 'tenant' OR (scope = 'user' AND scope_id = ANY($1)))
    AND (expires_at IS NULL OR expires_at > clock_timestamp())
"""


async def lock(tx: Tx, scope: Scope, scope_id: str) -> None:
    """One transaction at a time writes the memories of a place: another one that has the same fact, or one that
    contradicts it, waits here and then finds it."""
    place = " ".join((str(tx.tenant_id), scope, scope_id))
    await tx.take_turn(f"memory {place}")


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _array(values: Sequence[str] | None) -> list[str] | None:
    return None if values is None else list(values)
