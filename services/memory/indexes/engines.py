"""The engines of the index that are in use. `./claw memory migrate` changes them while all processes run.

`model` is the key of an embedding model: each engine has an index of its own for each model.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from functools import cache
from typing import NamedTuple
from uuid import UUID

from infra.errors import Transient
from infra.postgres.database import Database
from infra.postgres.tx import Tx
from services.memory.indexes.embeddings import LOCAL
from services.memory.indexes.index import Hit, VectorIndex, VectorRow
from services.memory.rights import EVERY, Owners

ENGINES = ("milvus", "pgvector")
# A process learns of a change within this time.
CACHE_SECONDS = 1.0
# One of two engines that has not answered a write gets no other one for this time: each would delay those of the other.
PAUSE_SECONDS = 5.0

Batches = Callable[[], AsyncIterator[Sequence[VectorRow]]]


class Choice(NamedTuple):
    reading: str
    """The engine in which searches look."""
    filling: tuple[str, ...]
    """The engines that get every document."""


async def choice(tx: Tx) -> Choice:
    [(reading, filling)] = await tx.sql("SELECT reading, filling FROM index_engine")
    return Choice(reading, tuple(filling))


async def choose(tx: Tx, new: Choice) -> None:
    await tx.sql("UPDATE index_engine SET reading = $1, filling = $2", new.reading, list(new.filling))


class Filled(NamedTuple):
    names: list[str]
    """The indexes that have taken the rows."""
    is_found: bool
    """The one in which searches look is among them."""
    error: Transient | None
    """Of an index that did not take the rows."""


def names(filling: Iterable[str], model: str) -> list[str]:
    """The names of the indexes that must have every text."""
    return [f"{engine}/{model}" for engine in filling]


class Engines:
    """`database`: the worker role's. `make`: the index of an engine and a model."""

    def __init__(self, database: Database, make: Callable[[str, str], VectorIndex]) -> None:
        self._database = database
        self._index = cache(make)
        self._known: tuple[float, Choice] | None = None
        self._paused_until: dict[str, float] = {}

    async def _choice(self) -> Choice:
        if self._known is None or time.monotonic() - self._known[0] > CACHE_SECONDS:
            async with self._database.begin() as tx:
                self._known = time.monotonic(), await choice(tx)
        return self._known[1]

    async def name(self, model: str) -> str:
        """The name of the index in which searches look."""
        return f"{(await self._choice()).reading}/{model}"

    async def filled(self, model: str) -> list[VectorIndex]:
        """The indexes that get every text."""
        return [self._index(engine, model) for engine in (await self._choice()).filling]

    async def check_milvus(self) -> None:
        """Makes one round trip to Milvus, if it is in use."""
        if "milvus" in (await self._choice()).filling:
            await self._index("milvus", LOCAL.name).check()

    async def search(
        self, model: str, vector: list[float], tenant_id: str, scope: str, limit: int, owners: Owners = EVERY
    ) -> list[Hit]:
        index = self._index((await self._choice()).reading, model)
        return await index.search(vector, tenant_id, scope, limit, owners)

    async def replace(
        self, model: str, tenant_id: str, owner_id: UUID, scope: str, batches: Batches, inside: Sequence[str]
    ) -> Filled:
        """Replaces the owner's rows in all engines that are filled, except for the indexes of the names `inside`, which
        have them. One that does not answer keeps the rows from no other."""
        reading = await self.name(model)
        names, error = await self._write(
            model, lambda index: index.replace(tenant_id, owner_id, scope, batches()), inside
        )
        return Filled(names, reading in (*names, *inside), error)

    async def remove(self, tenant_id: str, owner_id: UUID) -> None:
        """Removes the owner's rows of all models. Raises Transient if an engine does not answer."""
        _, error = await self._write(LOCAL.name, lambda index: index.remove(tenant_id, owner_id))
        if error:
            raise error

    async def remove_tenant(self, tenant_id: str) -> None:
        """Removes the tenant's rows of all models. Raises Transient if an engine does not answer."""
        _, error = await self._write(LOCAL.name, lambda index: index.remove_tenant(tenant_id))
        if error:
            raise error

    async def _write(
        self, model: str, write: Callable[[VectorIndex], Awaitable[None]], inside: Sequence[str] = ()
    ) -> tuple[list[str], Transient | None]:
        """Writes to all engines that are filled, except for the indexes of the names `inside`. Returns the names of
        those that have answered, and the error of one that has not."""
        answered: list[str] = []
        error: Transient | None = None
        indexes = [index for index in await self.filled(model) if index.name not in inside]
        for index in indexes:
            if len(indexes) > 1 and time.monotonic() < self._paused_until.get(index.name, 0.0):
                error = Transient(f"{index.name} has not answered the write before")
                continue
            try:
                await write(index)
            except Transient as failure:
                self._paused_until[index.name] = time.monotonic() + PAUSE_SECONDS
                error = failure
            else:
                answered.append(index.name)
        return answered, error
