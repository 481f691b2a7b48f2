"""The table of memories, made again from the streams `memory`. `keeping` writes both in a transaction.

Uses by agents and vectors have no events; they stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.postgres.db import sql
from infra.postgres.read_models import Recorded, folded_read_model
from services.memory.memories.events import State, evolve
from services.memory.memories.keeping import MEMORY

# Older events lack the digests, and `uses` of older rows counts uses by agents too.
_NOT_COMPARED = ("digest", "topic", "uses", "used_at")


def memory(memory_id: str, history: Sequence[Recorded]) -> Iterator[Mapping[str, Any]]:
    state: State | None = None
    for event, *_ in history:
        state = evolve(state, event)
    if state:
        yield {"id": memory_id, "tenant_id": history[0].tenant_id} | msgspec.structs.asdict(state)


_ALL = folded_read_model(
    MEMORY,
    memory,
    name="memories",
    table="memory",
    key=("id",),
    columns=("tenant_id", *(name for name in State.__struct_fields__ if name not in _NOT_COMPARED)),
    stream="l.id::text",
    in_scope="l.id = ANY($1::text[]::uuid[])",
    new=_NOT_COMPARED,
    # Only the person's key could make a digest that the events lack.
    restorable="length(r.digest) > 0",
)


async def _of_known_persons(connection: AsyncConnection, ids: Sequence[str]) -> str:
    """Memories of erased persons are deleted without an event: their streams stay, sealed under a key that is gone."""
    [(kept,)] = await sql(
        connection,
        """
        SELECT coalesce(jsonb_agg(m), '[]')::text
        FROM jsonb_array_elements($1::text::jsonb) AS m
        WHERE NOT EXISTS (
            SELECT FROM subject_key AS k
            WHERE k.tenant_id = m->>'tenant_id' AND k.destroyed_at IS NOT NULL
                AND (k.subject_id = m->>'subject_id' OR (m->>'scope' = 'user' AND k.subject_id = m->>'scope_id'))
        )
        """,
        await _ALL.rebuild(connection, ids),
    )
    return str(kept)


READ_MODELS = (replace(_ALL, rebuild=_of_known_persons),)
