"""Moves the index to another engine while all processes run: fill both, wait, compare, switch.

The state is in PostgreSQL, so a migration that was stopped goes on if it is started again. Until the switch, and after
it until `alone`, both engines get every document: going back is the same migration in the other direction. An engine
that gets no documents has no rows: the deletions of documents do not reach it either.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

import numpy as np

from infra.errors import Conflict, Transient
from infra.postgres.database import Database
from infra.postgres.tx import Tx
from services.memory.indexes import engines, vectors
from services.memory.indexes.engines import CACHE_SECONDS, ENGINES, Choice
from services.memory.indexes.filling import fill_missing, refill, tenants_of, unmark, waiting_for
from services.memory.indexes.index import VectorIndex
from services.memory.indexes.models import active_key, all_keys
from services.memory.indexes.pgvector import PgvectorIndex

SAMPLES = 50
NEIGHBOURS = 10
MIN_RECALL = 0.9
# Exact neighbours are computed in this process; more passages of one tenant would not fit into its memory.
MAX_EXACT = 50_000
POLL_SECONDS = 1.0
# Texts that are still missing are enqueued again: a process that was at work before did not know of the engine.
AGAIN_SECONDS = 10.0

Make = Callable[[str, str], VectorIndex]
"""The index of an engine and a model."""


@dataclass(frozen=True)
class Migrated:
    texts: int
    """The documents, replies and memories."""
    missing: int
    """Documents that the engine does not have although it should."""
    sampled: int
    """Passages whose neighbours were compared."""
    recall: float
    """The share of their ten exact neighbours that the engine found; 1 if there is no passage."""
    switched: bool


async def migrate(
    database: Database, target: str, make: Make, *, alone: bool, progress: Callable[[int, int], None]
) -> Migrated:
    """alone: after the switch, only the target gets documents, and the other engine is emptied.

    Raises Conflict if the target does not have all documents or its recall is too low, and then nothing is switched; or
    if the other engine cannot be emptied after the switch.
    """
    async with database.begin() as tx:
        model, known = await active_key(tx), await engines.choice(tx)
    index = make(target, model)
    if target not in known.filling:
        await _empty(database, target, make)
    async with database.begin() as tx:
        before = await engines.choice(tx)
        filling = tuple(sorted({*before.filling, target}))
        await engines.choose(tx, before._replace(filling=filling))
    # All processes fill both from now on, except for texts on their way.
    await asyncio.sleep(2 * CACHE_SECONDS)
    texts = await until_filled(database, model, index.name, None, progress)
    missing, sampled, recall = await verified(database, index)
    async with database.begin() as tx:
        await _check_model(tx, model)
        await engines.choose(tx, Choice(target, (target,) if alone else filling))
    if alone:
        # No process searches or fills the others after this time.
        await asyncio.sleep(2 * CACHE_SECONDS)
        for engine in ENGINES:
            if engine != target:
                try:
                    await _empty(database, engine, make)
                except Transient as error:
                    raise Conflict(
                        f"searches look in {target} now, but {engine} still has its vectors: {error}. Start the same "
                        f"command again once {engine} answers, or delete its data"
                    ) from error
    return Migrated(texts, missing, sampled, recall, switched=True)


async def _empty(database: Database, engine: str, make: Make) -> None:
    """Removes all rows of the engine, which gets no documents. Raises Transient if it does not answer."""
    async with database.begin() as tx:
        keys, tenants = await all_keys(tx), await tenants_of(tx)
    for key in keys:
        index = make(engine, key)
        # First: if the command ends in between, no text counts as one that the engine has.
        for tenant_id in tenants:
            async with database.begin(tenant_id=tenant_id) as tx:
                await unmark(tx, tenant_id, index.name)
        await index.drop()


async def until_filled(
    database: Database, model: str, name: str, tenant_id: str | None, progress: Callable[[int, int], None]
) -> int:
    """Waits until the index of this name has everything. Returns how much that is. Raises Conflict if the embedding
    model changes meanwhile."""
    fill_at = 0.0
    while True:
        async with database.begin() as tx:
            await _check_model(tx, model)
            total, waiting = await waiting_for(tx, model, [name], tenant_id)
        progress(total - waiting, total)
        if waiting == 0:
            return total
        if time.monotonic() > fill_at:
            await fill_missing(database, model, [name])
            fill_at = time.monotonic() + AGAIN_SECONDS
        await asyncio.sleep(POLL_SECONDS)


async def _check_model(tx: Tx, model: str) -> None:
    """The model stays active until the commit. Raises Conflict if it is not."""
    if await active_key(tx, lock=True) != model:
        raise Conflict("the embedding model has changed meanwhile: start the command again")


async def build_again(database: Database, tenant_id: str | None, progress: Callable[[int, int], None]) -> int:
    """Fills the index that searches use again, from the vectors in PostgreSQL, of one tenant or of all. Returns the
    number of texts. The old rows are found until the new ones are there."""
    async with database.begin() as tx:
        model, reading = await active_key(tx), (await engines.choice(tx)).reading
    name = f"{reading}/{model}"
    await refill(database, name, only=tenant_id)
    return await until_filled(database, model, name, tenant_id, progress)


async def verified(database: Database, index: VectorIndex) -> tuple[int, int, float]:
    """Compares samples of a filled index with PostgreSQL; makes the HNSW of large tenants before.

    Raises Conflict if it does not have all documents or its recall is too low.
    """
    if isinstance(index, PgvectorIndex):
        await index.index_large_tenants("document")
    missing, sampled, recall = await _compared(database, index)
    if missing or recall < MIN_RECALL:
        raise Conflict(
            f"{index.name}: {missing} of the sampled documents are incomplete, must be 0; the recall is "
            f"{recall:.3f}, must be at least {MIN_RECALL}; nothing is switched"
        )
    return missing, sampled, recall


async def _compared(database: Database, index: VectorIndex) -> tuple[int, int, float]:
    """The number of sampled documents that are not complete in the index, of sampled passages, and their recall."""
    async with database.begin() as tx:
        tenants = [tenant_id for (tenant_id,) in await tx.sql("SELECT DISTINCT tenant_id FROM document")]
    model = index.name.partition("/")[2]
    found = wanted = sampled = 0
    incomplete: set[UUID] = set()
    for tenant_id in random.sample(tenants, min(len(tenants), SAMPLES)):
        async with database.begin(tenant_id=tenant_id) as tx:
            rows = await tx.sql(
                f"""
                SELECT p.id, p.document_id, {vectors.of("$2", "p")}
                FROM passage p
                JOIN document d ON d.id = p.document_id
                WHERE p.tenant_id = $1 AND $2 IN (p.model, p.other_model) AND d.status = 'indexed'
                    AND d.deleted_at IS NULL AND $3 = ANY(d.indexed_in)
                LIMIT $4
                """,
                tenant_id,
                model,
                index.name,
                MAX_EXACT,
            )
        if not rows:
            continue
        stored = np.stack([np.frombuffer(vector, dtype="<f4") for _, _, vector in rows])
        stored /= np.linalg.norm(stored, axis=1, keepdims=True)
        for n in random.sample(range(len(rows)), max(1, min(len(rows), SAMPLES // len(tenants)))):
            cosines = stored @ stored[n]
            most = min(NEIGHBOURS, len(rows))
            # Passages with equal texts have equal cosines: one that is as near as the last neighbour is right, too.
            floor = np.sort(cosines)[-most] - 1e-5
            exact = {row[0] for row, cosine in zip(rows, cosines, strict=True) if cosine >= floor}
            hits = await index.search(stored[n].tolist(), tenant_id, "document", most)
            found += sum(hit.id in exact for hit in hits)
            wanted += most
            sampled += 1
            if not any(hit.score > 1 - 1e-3 for hit in hits):
                incomplete.add(rows[n][1])
    return len(incomplete), sampled, found / wanted if wanted else 1.0
