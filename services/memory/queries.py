"""The vectors of queries. Queries that wait at the same time are embedded by one call, and the latest are kept."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from infra.clock import uuid7
from infra.errors import EffectFailed, InvalidMessage, Transient, Unanswered
from infra.postgres.database import Database
from services.memory.embeddings import BATCH, Embedded, Embedder
from services.memory.usage import record_usage

# The vectors of so many queries are kept.
KNOWN = 2_000


class _Waiting(NamedTuple):
    text: str
    made: asyncio.Future[Embedded]


class QueryVectors:
    """A query is embedded at once while fewer than `calls_at_once` calls of the embedder run. Those that come meanwhile
    wait for the end of a call, and then go together. `database`: the request role's."""

    def __init__(self, database: Database, embedder: Embedder) -> None:
        self._database = database
        self._embedder = embedder
        self._known: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._waiting: deque[_Waiting] = deque()
        self._calls = 0
        # The loop itself keeps only weak references to its tasks.
        self._tasks: set[asyncio.Task[None]] = set()

    async def of(self, tenant_id: str, text: str) -> NDArray[np.float32]:
        """One that the tenant has asked lately is not embedded again, and costs nothing.

        Raises InvalidMessage if the embedding endpoint refuses the text, Transient if it is unavailable.
        """
        key = hashlib.blake2b(f"{tenant_id}\0{text}".encode(), digest_size=16).digest()
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return known
        try:
            embedded = await self._embed(text)
        except EffectFailed as error:
            raise InvalidMessage("query", f"could not be embedded: {error.reason}") from error
        except Unanswered as error:
            raise Transient(str(error)) from error
        async with self._database.begin(tenant_id=tenant_id) as tx:
            record_usage(tx, self._embedder.model, f"query/{uuid7()}/1", embedded.tokens)
        vector: NDArray[np.float32] = embedded.vectors[0]
        self._known[key] = vector
        if len(self._known) > KNOWN:
            self._known.popitem(last=False)
        return vector

    async def _embed(self, text: str) -> Embedded:
        waiting = _Waiting(text, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._calls < self._embedder.calls_at_once:
            self._calls += 1
            task = asyncio.create_task(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await waiting.made

    async def _work(self) -> None:
        try:
            while self._waiting:
                await self._call([self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))])
        finally:
            self._calls -= 1

    async def _call(self, batch: Sequence[_Waiting]) -> None:
        # A caller whose time is over has cancelled its part.
        batch = [each for each in batch if not each.made.done()]
        if not batch:
            return
        try:
            made = await self._embedder.queries([each.text for each in batch])
        except Exception as error:
            if isinstance(error, EffectFailed) and len(batch) > 1:
                # The refusal of one text must not fail the others.
                for each in batch:
                    await self._call([each])
                return
            for each in batch:
                if not each.made.done():
                    each.made.set_exception(error)
            return
        for each, embedded in zip(batch, made, strict=True):
            if not each.made.done():
                each.made.set_result(embedded)
