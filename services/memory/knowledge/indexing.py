"""Processes one document: parses it, cuts it into passages, embeds and indexes them; or removes the document.

Each stage commits its results. After a crash the next process continues with the stage that was not committed.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from typing import IO, Any, NamedTuple
from uuid import UUID

from infra.errors import EffectFailed, NoCredit, NotFound, NotYet, Transient, Unanswered
from infra.failpoint import failpoint
from infra.lanes.claims import LaneLost
from infra.lanes.effects import Effects, Outcome
from infra.observe.logs import get_logger
from infra.postgres.db import is_transient
from infra.postgres.tx import Tx
from infra.stores.objects import Objects
from services.memory.domain import count_tokens, embedded_text
from services.memory.files.parser import DocumentRefused, Findings, parsed
from services.memory.indexes.embeddings import BATCH, Embedder
from services.memory.indexes.engines import Engines, Filled
from services.memory.indexes.index import INSERT_ROWS, VectorRow
from services.memory.indexes.models import EmbeddingModels
from services.memory.indexes.vectors import store
from services.memory.knowledge import documents, passages, versions
from services.memory.knowledge.documents import IndexedVersion
from services.memory.knowledge.passages import StoredPassage
from services.memory.knowledge.versions import OldVersion
from services.memory.lanes import enqueue_fill
from services.memory.metering.credit import Credit
from services.memory.metering.usage import record_document, record_usage

# After this time a document gives its place to other documents.
TURN_SECONDS = 10.0
# The progress of the document at the end of each stage.
_PARSED, _CHUNKED, _EMBEDDED = 0.1, 0.2, 0.9
_log = get_logger("memory.indexing")


class _Deleted(Exception):
    """The document was deleted meanwhile. No work is left."""


class Replaced(NamedTuple):
    """A document that has a new version, and the place of the old one."""

    document_id: UUID
    old: OldVersion


class Indexing:
    def __init__(self, objects: Objects, models: EmbeddingModels, index: Engines, credit: Credit) -> None:
        self._objects = objects
        self._models = models
        self._index = index
        self._credit = credit

    async def index(self, id_: UUID, effects: Effects, tx: Tx) -> Replaced | None:
        """Runs the stages that the document has not passed yet. An unreadable document ends as failed.

        If it was the next version of another document, it takes that document's place; returns the place of the old
        version then, which is left to `remove_version`.
        """
        try:
            document, model, is_everywhere = await self._index_stages(id_, effects)
        except DocumentRefused as error:
            await self._credit.release_document(_tenant(tx), id_)
            await documents.advance(tx, id_, "failed", 1.0, str(error))
        except (_Deleted, NotFound):
            _log.info("document was deleted before it was indexed", document_id=str(id_))
        except Exception as error:
            if not isinstance(error, LaneLost) and not is_transient(error):
                # Otherwise the document would stay unfinished forever once its item is a dead letter.
                async with effects.begin() as failed:
                    await documents.advance(failed, id_, "failed", 1.0, "The platform had an internal error.")
            raise
        else:
            await self._models.hold(tx, model.key)
            if not is_everywhere:
                enqueue_fill(tx, document.replaces or id_, model.key, document.owner)
            if document.replaces:
                old = await versions.switch(tx, id_, document.replaces)
                if old is None:
                    return None
                record_document(tx, id_, document.origin)
                return Replaced(document.replaces, old)
            if document.status != "indexed" and await documents.advance(tx, id_, "indexed", 1.0):
                record_document(tx, id_, document.origin)
        return None

    async def _index_stages(self, id_: UUID, effects: Effects) -> tuple[IndexedVersion, Embedder, bool]:
        """Returns the document, the model by which searches find it, and whether all engines have it that get every
        document: searches need only one of them."""
        active = await self._models.active()
        async with effects.begin() as tx:
            tenant_id = _tenant(tx)
            document = await documents.version(tx, id_)
        if document.status == "indexed":
            return document, active, True
        try:
            await self._credit.hold_document(tenant_id, id_, document.origin)
        except NoCredit as error:
            raise DocumentRefused(f"The document cannot be paid for: {error}. Upload it again later.") from error
        if document.status in ("stored", "parsed", "failed"):
            await self._parse(document, effects)
        if document.replaces:
            async with effects.begin() as tx:
                await versions.reuse_vectors(tx, id_, document.replaces)
        try:
            await self._embed(document, active, effects)
        except EffectFailed as error:
            raise DocumentRefused(f"The text could not be embedded: {error.reason}.") from error

        async def by_target(target: Embedder) -> None:
            await self._embed(document, target, effects, again=True)
            filled = await self._fill_index(document, target, effects)
            if filled.error:
                raise filled.error

        await self._models.by_target(by_target)
        filled = await self._fill_index(document, active, effects)
        if filled.error and not filled.is_found:
            raise filled.error
        failpoint("after_index")
        return document, active, filled.error is None

    async def fill(self, id_: UUID, owner: UUID | None, model: Embedder, effects: Effects) -> None:
        """Embeds an indexed document by the model if it was not, and puts it into the model's index. Searches find it
        by its words, and by the active model, all the time.

        owner: of the rows of the version that was to be put there."""
        found: UUID | None = None
        async with effects.begin() as tx:
            tenant_id = _tenant(tx)
        try:
            async with effects.begin() as tx:
                document = await documents.version(tx, id_)
            found = document.owner
            await self._embed(document, model, effects, again=True)
            filled = await self._fill_index(document, model, effects, document.indexed_in)
            if filled.error:
                raise filled.error
        except (_Deleted, NotFound):
            _log.info("document was deleted before it was put into the index", document_id=str(id_))
        if owner and owner != found:
            # The process of an earlier attempt may have died after it had put the rows there, behind their removal.
            await self._index.remove(tenant_id, owner)

    async def remove(self, id_: UUID, effects: Effects, tx: Tx) -> None:
        """Removes the file, the vectors and the rows of a deleted document."""
        async with effects.begin() as begun:
            place = await versions.place(begun, id_)
        if place:
            await self.remove_version(place, effects)
            await documents.purge(tx, id_)

    async def remove_version(self, old: OldVersion, effects: Effects) -> None:
        """Removes the file and the vectors of a version that was replaced."""
        async with effects.begin() as begun:
            tenant_id = _tenant(begun)
        await self._objects.delete(old.path)
        await self._index.remove(tenant_id, old.owner)

    async def _parse(self, document: IndexedVersion, effects: Effects) -> None:
        async with effects.begin() as tx:
            # An earlier attempt may have stored some of the passages.
            await passages.drop(tx, document.id)
        count = 0
        findings = Findings()

        async def check() -> None:
            async with effects.begin() as tx:
                await documents.version(tx, document.id)

        async with (
            self._local_file(document) as file,
            aclosing(parsed(file, document.content_type, findings, check)) as parts,
        ):
            async for chunks in parts:
                async with effects.begin() as tx:
                    await _advance(tx, document.id, "parsed", _PARSED)
                    await passages.add(tx, document.id, count, chunks)
                count += len(chunks)
        failpoint("after_passages")
        async with effects.begin() as tx:
            await _advance(tx, document.id, "chunked", _CHUNKED)
            await documents.set_findings(
                tx, document.id, findings.pages, findings.pages_without_text, findings.warnings
            )

    @asynccontextmanager
    async def _local_file(self, document: IndexedVersion) -> AsyncIterator[IO[bytes]]:
        try:
            async with self._objects.fetch(document.path) as stored:
                # Without a name: only the process that gets the open file can read it.
                with tempfile.TemporaryFile() as file:
                    await asyncio.to_thread(shutil.copyfileobj, stored, file)
                    file.flush()
                    yield file
        except NotFound as error:
            raise DocumentRefused("The stored file no longer exists. Upload the document again.") from error

    async def _embed(self, document: IndexedVersion, model: Embedder, effects: Effects, *, again: bool = False) -> None:
        """Embeds the passages that have no vector of the model. again: the status of the document stays."""
        id_ = document.id
        async with effects.begin() as tx:
            total = await passages.count(tx, id_)
        began = time.monotonic()
        while True:
            async with effects.begin() as tx:
                batch = await passages.without_vector(tx, id_, model.key, BATCH)
                if not batch:
                    if not again:
                        await _advance(tx, id_, "embedded", _EMBEDDED)
                    return
            await self._embed_batch(document, model, batch, None if again else total, effects)
            if time.monotonic() - began > TURN_SECONDS:
                # A large document takes hours. The vectors made so far are stored.
                raise NotYet(timedelta(0), "the other documents have their turn")

    async def _embed_batch(
        self,
        document: IndexedVersion,
        model: Embedder,
        batch: Sequence[StoredPassage],
        total: int | None,
        effects: Effects,
    ) -> None:
        """`total`: all passages of the document, for its progress; None if it shows none."""
        id_, origin, first = document.id, document.origin, batch[0].n
        # Of the first embedding, and of one by another model or for another one of the vectors.
        usage = f"{id_}/{first}" if total is not None else f"{id_}/{first}/{effects.item_id}/{model.key}"
        texts = [embedded_text(passage.text, passage.section) for passage in batch]
        begun, tenant_id = 0, ""
        hold_id: UUID | None = None
        alive = True
        vectors: Any = None

        async def begin(tx: Tx, attempt: int, lost: bool) -> None:
            nonlocal begun, tenant_id
            begun, tenant_id = attempt, _tenant(tx)

        async def call(_: str) -> int:
            nonlocal vectors, hold_id
            # The tenant did not ask for a further embedding: it is billed, and no lack of credit stops a change.
            if total is not None:
                hold_id = await self._credit.hold_embedding(tenant_id, batch[0].id, model.model, texts, origin)
            try:
                vectors, tokens = await model.passages(texts)
            except Unanswered as error:
                # The endpoint may have done the work and may charge for it. A repetition does no harm.
                async with effects.begin() as tx:
                    tokens = sum(map(count_tokens, texts))
                    record_usage(tx, model.model, f"{usage}/{begun}", tokens, origin, estimated=True)
                raise Transient(str(error)) from error
            return tokens

        async def keep(tx: Tx, outcome: Outcome[int]) -> None:
            nonlocal alive
            if outcome.result is None:
                return
            if total is not None:
                progress = _CHUNKED + (_EMBEDDED - _CHUNKED) * (first + len(batch)) / total
                alive = await documents.advance(tx, id_, "chunked", progress)
            kept = await self._models.keep(tx, model.key)
            made = {passage.id: vector.tobytes() for passage, vector in zip(batch, vectors, strict=True)}
            await store(tx, "passage", model.key, kept, made)
            record_usage(tx, model.model, f"{usage}/{outcome.attempt}", outcome.result, origin, hold_id)

        # The item is part of the key: if the platform returns to a former model, the passage is embedded again.
        key = f"embed/{effects.item_id}/{batch[0].id}/{model.key}"
        outcome = await effects.run(key, call, kind="repeatable", result=int, before=begin, after=keep)
        if not alive:
            raise _Deleted
        if outcome.state == "failed":
            raise EffectFailed(str(outcome.error))

    async def _fill_index(
        self, document: IndexedVersion, model: Embedder, effects: Effects, inside: Sequence[str] = ()
    ) -> Filled:
        """inside: the names of indexes that have the rows already."""

        async def batches() -> AsyncIterator[Sequence[VectorRow]]:
            last = -1
            while True:
                async with effects.begin() as tx:
                    rows = await passages.with_vectors(tx, document.id, model.key, last, INSERT_ROWS)
                if not rows:
                    return
                last = rows[-1][1]
                yield [VectorRow(passage_id, vector) for passage_id, _, vector in rows]

        async with effects.begin() as tx:
            tenant_id = _tenant(tx)
        filled = await self._index.replace(model.key, tenant_id, document.owner, "document", batches, inside)
        async with effects.begin() as tx:
            is_marked = await documents.mark_indexed(tx, document, filled.names)
        if not is_marked:
            # It was deleted or replaced meanwhile, and its rows may have been removed before the last of these came.
            await self._index.remove(tenant_id, document.owner)
        return filled


async def _advance(tx: Tx, id_: UUID, status: str, progress: float) -> None:
    if not await documents.advance(tx, id_, status, progress):
        raise _Deleted


def _tenant(tx: Tx) -> str:
    assert tx.tenant_id is not None
    return tx.tenant_id
