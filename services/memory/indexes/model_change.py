"""Changes the embedding model: embeds everything by the new one, compares, switches, and deletes the old vectors.

The state is in PostgreSQL. Until the switch, searches use the old model and its index, and both models embed new
texts. A process that dies leaves a state from which another one goes on.
"""

from __future__ import annotations

import time

import msgspec

from infra.errors import Conflict
from infra.failpoint import failpoint
from infra.observe.logs import get_logger
from infra.postgres.database import Database
from infra.postgres.leases import Leases
from infra.postgres.tx import Tx
from infra.service.periodic import Periodic
from services.memory.indexes import engines, vectors
from services.memory.indexes.engines import ENGINES, Engines
from services.memory.indexes.filling import fill_missing, tenants_of, unmark, waiting_for
from services.memory.indexes.migration import verified
from services.memory.indexes.models import EmbeddingModels

# Texts whose item has ended without a vector, and new ones that the target did not get, are enqueued again.
AGAIN_SECONDS = 10.0
# The pause after a turn, in times of its length.
SHARE = 9
# Searches that have begun before a switch use the old vectors.
KEEP_SECONDS = 60.0
_log = get_logger("memory.model_change")


class ModelChange(Periodic):
    """Runs until stopped, in every process; one at a time works. `database`: the worker role's."""

    pause = 1.0
    failure = "could not go on with the change of the embedding model"

    def __init__(self, database: Database, models: EmbeddingModels, index: Engines) -> None:
        super().__init__()
        self._database = database
        self._models = models
        self._index = index
        self._leases = Leases(database.engine, "embedding model", 1)
        self._fill_at = self._pause_until = 0.0

    async def run(self) -> None:
        await super().run()
        await self._leases.release()

    async def tick(self) -> None:
        # Also records the model of the settings, at the start.
        target = (await self._models.current()).target
        await self._leases.refresh()
        if not self._leases.held:
            return
        if target and time.monotonic() > self._pause_until:
            begun, pause = time.monotonic(), 0.0
            try:
                await self._advance(target.key)
            except Conflict as error:
                # The comparison failed.
                await self._models.note(target.key, error)
                pause = AGAIN_SECONDS
            ended = time.monotonic()
            # The texts of all tenants are counted: with millions of them each second would keep PostgreSQL busy.
            self._pause_until = ended + max(pause, SHARE * (ended - begun))
        rows = await self._database.autocommit(
            """
            SELECT key
            FROM embedding_model
            WHERE state = 'former' AND since < clock_timestamp() - make_interval(secs => $1)
            ORDER BY key
            """,
            KEEP_SECONDS,
        )
        for (key,) in rows:
            await self._delete(key)

    async def _advance(self, key: str) -> None:
        """Switches to the target once it has embedded everything."""
        async with self._database.begin() as tx:
            names = engines.names((await engines.choice(tx)).filling, key)
            waiting = (await waiting_for(tx, key, names)).waiting
        if waiting:
            if time.monotonic() > self._fill_at:
                await fill_missing(self._database, key, names)
                self._fill_at = time.monotonic() + AGAIN_SECONDS
            return
        for index in await self._index.filled(key):
            await verified(self._database, index)
        failpoint("before_model_switch")
        async with self._database.begin() as tx:
            # Waits for each transaction with a text that only the old model has embedded, and then counts that text.
            await tx.sql("SELECT FROM embedding_model WHERE state <> 'former' ORDER BY key FOR UPDATE")
            names = engines.names((await engines.choice(tx)).filling, key)
            [(is_target,)] = await tx.sql(
                "SELECT EXISTS (SELECT FROM embedding_model WHERE key = $1 AND state = 'target')", key
            )
            if not is_target or (await waiting_for(tx, key, names)).waiting:
                return
            for state, now in (("active", "former"), ("target", "active")):
                await tx.sql(
                    """
                    UPDATE embedding_model
                    SET state = $2, since = clock_timestamp(), error = NULL, failed_at = NULL
                    WHERE state = $1
                    """,
                    state,
                    now,
                )
        failpoint("after_model_switch")
        _log.info("searches use another embedding model now", model=key)

    async def _delete(self, key: str) -> None:
        """Deletes the vectors of a model that is not in use any more, then forgets the model."""
        async with self._database.begin() as tx:
            tenants = await tenants_of(tx)
        for tenant_id in tenants:
            await self._delete_of_tenant(tenant_id, key)
        for index in await self._index.filled(key):
            await index.drop()
        failpoint("before_model_forgotten")
        async with self._database.begin() as tx:
            await tx.sql("DELETE FROM embedding_model WHERE key = $1 AND state = 'former'", key)
        _log.info("the vectors of a former embedding model are deleted", model=key)

    async def _delete_of_tenant(self, tenant_id: str, key: str) -> None:
        async with self._database.begin(tenant_id=tenant_id) as tx:
            for name in engines.names(ENGINES, key):
                await unmark(tx, tenant_id, name)
            ids = await tx.sql("SELECT id FROM document WHERE tenant_id = $1 ORDER BY id", tenant_id)
        for (document_id,) in ids:
            async with self._database.begin(tenant_id=tenant_id) as tx:
                await vectors.forget(tx, "passage", "document_id = $2", key, document_id)
        async with self._database.begin(tenant_id=tenant_id) as tx:
            for table in ("utterance", "memory"):
                await vectors.forget(tx, table, "tenant_id = $2", key, tenant_id)


class ModelState(msgspec.Struct):
    key: str
    state: str
    """active, target or former."""
    texts: int
    """All documents, replies and memories."""
    waiting: int
    """Those that the model, or its index, does not have."""
    error: str | None


async def states(tx: Tx) -> list[ModelState]:
    """For operators: the embedding models, and the number of texts that each has embedded."""
    filling = (await engines.choice(tx)).filling
    rows = await tx.sql("SELECT key, state, error FROM embedding_model ORDER BY state, key")
    return [
        ModelState(key, state, *await waiting_for(tx, key, engines.names(filling, key)), error)
        for key, state, error in rows
    ]
