"""Rebuilds the table ``memory`` from the events alone and compares it with the live one.

The answers of models are in the events, so no model is asked again. Counters of reads and vectors are not rebuilt: they
are not facts about people.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple
from uuid import UUID

import msgspec

from infra.postgres.event_store import read_all
from infra.postgres.tx import Tx
from services.memory.events import State, evolve
from services.memory.keeping import COLUMNS, MEMORY, state_of, store


class Kept(NamedTuple):
    """A memory and its tenant."""

    tenant_id: str
    state: State


class Rebuilt(NamedTuple):
    live: int
    live_hash: str
    rebuilt: int
    rebuilt_hash: str
    different: int
    """How many memories are not the same in both, or only in one."""

    @property
    def equal(self) -> bool:
        return self.live_hash == self.rebuilt_hash


async def rebuild(tx: Tx, *, apply: bool = False) -> Rebuilt:
    """Compares the memories of all tenants with their events, under a lock that keeps writers out.

    `apply`: writes those that differ as the events have them.
    """
    # A writer holds its lock on the table until its events are committed too, so all events are read.
    await tx.sql("LOCK TABLE memory IN EXCLUSIVE MODE")
    rows = await tx.sql(f"SELECT id, tenant_id, {COLUMNS} FROM memory")
    live = {id_: Kept(tenant_id, state_of(row)) for id_, tenant_id, *row in rows}
    rebuilt = await _from_events(tx, live)
    different = sorted(
        id_ for id_ in live.keys() | rebuilt.keys() if _encoded(live.get(id_)) != _encoded(rebuilt.get(id_))
    )
    if apply:
        # All of them first: a row of before could say the same as a new one.
        await tx.sql("DELETE FROM memory WHERE id = ANY($1::uuid[])", different)
        for id_ in different:
            if kept := rebuilt.get(id_):
                tx.tenant_id = kept.tenant_id
                await store(tx, id_, kept.state)
    return Rebuilt(len(live), _hash(live), len(rebuilt), _hash(rebuilt), len(different))


async def _from_events(tx: Tx, live: Mapping[UUID, Kept]) -> dict[UUID, Kept]:
    rows = await tx.sql("SELECT tenant_id, subject_id FROM subject_key WHERE destroyed_at IS NOT NULL")
    erased = {(tenant_id, subject_id) for tenant_id, subject_id in rows}
    states: dict[UUID, State | None] = {}
    tenants: dict[UUID, str] = {}
    async for stored in read_all(await tx.connection(), MEMORY):
        id_ = UUID(stored.stream_id)
        states[id_] = evolve(states.get(id_), stored.event)
        tenants[id_] = stored.headers["tenant_id"]
    found = {}
    for id_, state in states.items():
        if state is None or (tenants[id_], state.subject_id) in erased:
            continue
        if not state.digest and id_ in live:
            # The events of older versions have no digests.
            known = live[id_].state
            state = msgspec.structs.replace(state, digest=known.digest, topic=known.topic)
        found[id_] = Kept(tenants[id_], state)
    return found


def _encoded(kept: Kept | None) -> bytes:
    if kept is None:
        return b""
    # The table keeps four bytes of the confidence.
    state = msgspec.structs.replace(kept.state, confidence=round(kept.state.confidence, 4))
    return msgspec.json.encode((kept.tenant_id, state))


def _hash(memories: Mapping[UUID, Kept]) -> str:
    digest = hashlib.sha256()
    for id_ in sorted(memories):
        digest.update(id_.bytes + _encoded(memories[id_]))
    return digest.hexdigest()
