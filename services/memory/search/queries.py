"""The vectors of queries. Queries that wait at the same time are embedded by one call, and the latest are kept."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from infra.clock import uuid7
from infra.errors import EffectFailed, InvalidMessage, Transient, Unanswered
from infra.outgoing.shares import Shares
from infra.postgres.database import Database
from services.memory.indexes.embeddings import BATCH, MAX_TOKENS, Embedded, Embedder
from services.memory.indexes.together import Together
from services.memory.metering.credit import Credit
from services.memory.metering.usage import UNKNOWN, UseSource, embedding, record_usage

# The vectors of so many queries are kept.
KNOWN = 2_000


class QueryVectors:
    """`database`: the request role's."""

    def __init__(self, database: Database, embedder: Embedder, credit: Credit) -> None:
        self._database = database
        self._embedder = embedder
        self._credit = credit
        self._known: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._together = Together(self._embed, at_once=embedder.calls_at_once, most=BATCH)
        # A tenant alone has half of the places: one full call for each that runs. Others wait in turns by tenant.
        self._places = Shares(4 * embedder.calls_at_once * BATCH)

    async def of(self, tenant_id: str, text: str, origin: UseSource = UNKNOWN) -> NDArray[np.float32]:
        """One that the tenant has asked lately is not embedded again, and costs nothing.

        Raises InvalidMessage if the embedding endpoint refuses the text, Transient if it is unavailable, NoCredit.
        """
        key = hashlib.blake2b(f"{tenant_id}\0{text}".encode(), digest_size=16).digest()
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return known
        await self._credit.use(tenant_id, embedding(self._embedder.model), "input_tokens", MAX_TOKENS, origin)
        try:
            async with self._places.place(tenant_id):
                embedded = await self._together.ask(None, text)
        except EffectFailed as error:
            raise InvalidMessage("query", f"could not be embedded: {error.reason}") from error
        except Unanswered as error:
            raise Transient(str(error)) from error
        async with self._database.begin(tenant_id=tenant_id) as tx:
            record_usage(tx, self._embedder.model, f"query/{uuid7()}/1", embedded.tokens, origin)
        vector: NDArray[np.float32] = embedded.vectors[0]
        self._known[key] = vector
        if len(self._known) > KNOWN:
            self._known.popitem(last=False)
        return vector

    async def _embed(self, key: None, texts: Sequence[str]) -> Sequence[Embedded | Exception]:
        try:
            return await self._embedder.queries(texts)
        except EffectFailed as error:
            # The refusal of one text must not fail the others.
            return [error] if len(texts) == 1 else [each for text in texts for each in await self._embed(None, [text])]
