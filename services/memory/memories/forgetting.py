"""Removes the facts that were learned from erased persons and from deleted messages."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any
from uuid import UUID

from msgspec.structs import replace

from infra.postgres import event_store
from infra.postgres.event_store import Aggregate
from infra.postgres.inbox import mark_handled
from infra.postgres.tx import Tx, derived_id
from services.memory.memories.store import lock

# The mark of a deleted message, and of a run that has one.
_WITHDRAWN = "withdrawn"


async def mark_withdrawn(tx: Tx, id_: UUID) -> None:
    """Of this run or message, `is_withdrawn` is true from now on. The place of its memories must be locked."""
    await mark_handled(await tx.connection(), _WITHDRAWN, [derived_id(id_, _WITHDRAWN)])


async def is_withdrawn(tx: Tx, subject_id: str, id_: UUID) -> bool:
    """True if the message, or one of the run, was deleted: nothing more is kept of it. Waits for a deletion under
    way."""
    await lock(tx, "user", subject_id)
    return bool(
        await tx.sql(
            "SELECT FROM inbox WHERE consumer = $1 AND message_id = $2", _WITHDRAWN, derived_id(id_, _WITHDRAWN)
        )
    )


async def mark_forgotten(tx: Tx, subject_id: str, facts: Collection[bytes]) -> None:
    """Of these facts of the person `is_forgotten` is true if they were said until now. facts: digests of
    texts, and ids of runs. The place of the person's memories must be locked."""
    await tx.sql(
        """
        INSERT INTO forgotten_fact (tenant_id, subject_id, fact, forgotten_at)
        SELECT $1, $2, fact, clock_timestamp() FROM unnest($3::bytea[]) AS n(fact)
        ON CONFLICT (tenant_id, subject_id, fact) DO UPDATE SET forgotten_at = excluded.forgotten_at
        """,
        tx.tenant_id,
        subject_id,
        sorted(facts),
    )


async def is_forgotten(tx: Tx, subject_id: str, facts: Collection[bytes | None], at: datetime) -> bool:
    """True if the person has forgotten or corrected one of these facts since `at`."""
    return bool(
        await tx.sql(
            """
            SELECT FROM forgotten_fact
            WHERE tenant_id = $1 AND subject_id = $2 AND fact = ANY($3::bytea[]) AND forgotten_at >= $4
            """,
            tx.tenant_id,
            subject_id,
            list(facts),
            at,
        )
    )


async def remove_texts(tx: Tx, memories: Aggregate[Any], id_: UUID) -> None:
    """Removes the texts from the events of a memory that is gone. Its state is the same without them."""
    rows = await tx.sql(
        """
        SELECT event_id, type, schema_version, data
        FROM event
        WHERE stream_id = $1 AND type IN ('MemoryLearned', 'MemoryChanged')
        """,
        f"{memories.name}:{id_}",
    )
    emptied = {event_id: replace(memories.events.decode(*stored), text=b"") for event_id, *stored in rows}
    await event_store.rewrite(await tx.connection(), emptied)


async def erase(tx: Tx, tenant_id: str, subject_id: str) -> None:
    """Deletes everything that was learned from an erased person, and the memories that were made of it."""
    await lock(tx, "user", subject_id)
    await tx.sql("DELETE FROM forgotten_fact WHERE tenant_id = $1 AND subject_id = $2", tx.tenant_id, subject_id)
    await tx.sql(
        """
        DELETE FROM memory
        WHERE tenant_id = $1 AND (subject_id = $2 OR (scope = 'user' AND scope_id = $2))
        """,
        tenant_id,
        subject_id,
    )
