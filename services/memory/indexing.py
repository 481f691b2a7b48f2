"""Processes one document: parses it, cuts it into passages, embeds and indexes them; or removes the document.

Each stage commits its results. After a crash the next process continues with the stage that was not committed.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple
from uuid import UUID

import msgspec

import infra
from infra.errors import NotFound, NotYet, Transient, Unanswered
from infra.failpoint import failpoint
from infra.lanes.claims import LaneLost
from infra.lanes.effects import Effects, Outcome
from infra.observe.logs import get_logger
from infra.postgres.db import is_transient
from infra.postgres.tx import Tx
from infra.stores.objects import Objects
from services.memory import confinement, documents
from services.memory.documents import OldVersion, Passage, Work
from services.memory.domain import Chunk, count_tokens, embedded_text
from services.memory.embeddings import BATCH, Embedder
from services.memory.engines import Engines
from services.memory.index import INSERT_ROWS, Row
from services.memory.usage import record_document, record_usage

PARSE_SECONDS = 600.0
# A parser without output is stopped within this time after its document was deleted.
CHECK_SECONDS = 2.0
# After this time a document gives its place to other documents.
TURN_SECONDS = 10.0
_STORE_ROWS = 500
# The progress of the document at the end of each stage.
_PARSED, _CHUNKED, _EMBEDDED = 0.1, 0.2, 0.9
_ROOT = Path(infra.__file__).parent.parent
_log = get_logger("memory.indexing")


class _Deleted(Exception):
    """The document was deleted meanwhile. No work is left."""


class _Refused(Exception):
    """The document cannot be indexed. The message is written for the person who uploaded it."""


class Replaced(NamedTuple):
    """A document that has a new version, and the place of the old one."""

    document_id: UUID
    old: OldVersion


class Indexing:
    def __init__(self, objects: Objects, embedder: Embedder, index: Engines) -> None:
        self._objects = objects
        self._embedder = embedder
        self._index = index

    async def index(self, id_: UUID, effects: Effects, tx: Tx) -> Replaced | None:
        """Runs the stages that the document has not passed yet. An unreadable document ends as failed.

        If it was the next version of another document, it takes that document's place; returns the place of the old
        version then, which is left to `remove_version`.
        """
        try:
            document = await self._index_stages(id_, effects)
        except _Refused as error:
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
            if document.replaces:
                old = await documents.switch(tx, id_, document.replaces)
                if old is None:
                    return None
                record_document(tx, id_)
                return Replaced(document.replaces, old)
            if document.status != "indexed" and await documents.advance(tx, id_, "indexed", 1.0):
                record_document(tx, id_)
        return None

    async def _index_stages(self, id_: UUID, effects: Effects) -> Work:
        async with effects.begin() as tx:
            document = await documents.work(tx, id_)
        if document.status == "indexed":
            return document
        if document.status in ("stored", "parsed", "failed"):
            await self._parse(document, effects)
        if document.replaces:
            async with effects.begin() as tx:
                await documents.reuse_vectors(tx, id_, document.replaces, self._embedder.model)
        await self._embed(id_, effects)
        await self._fill_index(document, effects)
        failpoint("after_index")
        return document

    async def fill(self, id_: UUID, effects: Effects) -> None:
        """Puts an indexed document into the index again; searches by words find it all the time."""
        try:
            async with effects.begin() as tx:
                document = await documents.work(tx, id_)
            await self._embed(id_, effects, again=True)
            await self._fill_index(document, effects)
        except (_Deleted, NotFound):
            _log.info("document was deleted before it was put into the index", document_id=str(id_))

    async def remove(self, id_: UUID, effects: Effects, tx: Tx) -> None:
        """Removes the file, the vectors and the rows of a deleted document."""
        async with effects.begin() as begun:
            place = await documents.place(begun, id_)
        if place:
            await self.remove_version(place, effects)
            await documents.purge(tx, id_)

    async def remove_version(self, old: OldVersion, effects: Effects) -> None:
        """Removes the file and the vectors of a version that was replaced."""
        async with effects.begin() as begun:
            tenant_id = _tenant(begun)
        await self._objects.delete(old.path)
        await self._index.remove(tenant_id, old.owner)

    async def _parse(self, document: Work, effects: Effects) -> None:
        async with effects.begin() as tx:
            # An earlier attempt may have stored some of the passages.
            await documents.drop_passages(tx, document.id)
        count = 0
        findings = Findings()

        async def check() -> None:
            async with effects.begin() as tx:
                await documents.work(tx, document.id)

        async with (
            self._local_file(document) as file,
            aclosing(_parsed(file, document.content_type, findings, check)) as parsed,
        ):
            async for chunks in parsed:
                async with effects.begin() as tx:
                    await _advance(tx, document.id, "parsed", _PARSED)
                    await documents.add_passages(tx, document.id, count, chunks)
                count += len(chunks)
        failpoint("after_passages")
        async with effects.begin() as tx:
            await _advance(tx, document.id, "chunked", _CHUNKED)
            await documents.set_findings(
                tx, document.id, findings.pages, findings.pages_without_text, findings.warnings
            )

    @asynccontextmanager
    async def _local_file(self, document: Work) -> AsyncIterator[IO[bytes]]:
        try:
            async with self._objects.fetch(document.path) as stored:
                # Without a name: only the process that gets the open file can read it.
                with tempfile.TemporaryFile() as file:
                    await asyncio.to_thread(shutil.copyfileobj, stored, file)
                    file.flush()
                    yield file
        except NotFound as error:
            raise _Refused("The stored file no longer exists. Upload the document again.") from error

    async def _embed(self, id_: UUID, effects: Effects, *, again: bool = False) -> None:
        """Embeds the passages that have no vector of the model. again: the document stays indexed meanwhile."""
        async with effects.begin() as tx:
            total = await documents.passage_count(tx, id_)
        began = time.monotonic()
        while True:
            async with effects.begin() as tx:
                passages = await documents.without_vector(tx, id_, self._embedder.model, BATCH)
                if not passages:
                    if not again:
                        await _advance(tx, id_, "embedded", _EMBEDDED)
                    return
            await self._embed_batch(id_, passages, None if again else total, effects)
            if time.monotonic() - began > TURN_SECONDS:
                # A large document takes hours. The vectors made so far are stored.
                raise NotYet(timedelta(0), "the other documents have their turn")

    async def _embed_batch(self, id_: UUID, passages: Sequence[Passage], total: int | None, effects: Effects) -> None:
        """`total`: all passages of the document, for its progress; None if it shows none."""
        first = passages[0].n
        texts = [embedded_text(passage.text, passage.section) for passage in passages]
        begun = 0
        alive = True
        vectors: Any = None

        async def begin(_: Tx, attempt: int, lost: bool) -> None:
            nonlocal begun
            begun = attempt

        async def call(_: str) -> int:
            nonlocal vectors
            try:
                vectors, tokens = await self._embedder.passages(texts)
            except Unanswered as error:
                # The endpoint may have done the work and may charge for it. A repetition does no harm.
                async with effects.begin() as tx:
                    tokens = sum(map(count_tokens, texts))
                    record_usage(tx, self._embedder.model, f"{id_}/{first}/{begun}", tokens, estimated=True)
                raise Transient(str(error)) from error
            return tokens

        async def keep(tx: Tx, outcome: Outcome[int]) -> None:
            nonlocal alive
            if outcome.result is None:
                return
            if total is not None:
                progress = _CHUNKED + (_EMBEDDED - _CHUNKED) * (first + len(passages)) / total
                alive = await documents.advance(tx, id_, "chunked", progress)
            await documents.set_vectors(tx, self._embedder.model, passages, vectors)
            record_usage(tx, self._embedder.model, f"{id_}/{first}/{outcome.attempt}", outcome.result)

        # The item is part of the key: if the platform returns to a former model, the passage is embedded again.
        key = f"embed/{effects.item_id}/{passages[0].id}/{self._embedder.model}"
        outcome = await effects.run(key, call, kind="repeatable", result=int, before=begin, after=keep)
        if not alive:
            raise _Deleted
        if outcome.state == "failed":
            raise _Refused(f"The text could not be embedded: {outcome.error}.")

    async def _fill_index(self, document: Work, effects: Effects) -> None:
        async def batches() -> AsyncIterator[Sequence[Row]]:
            last = -1
            while True:
                async with effects.begin() as tx:
                    rows = await documents.vectors(tx, document.id, last, INSERT_ROWS)
                if not rows:
                    return
                last = rows[-1][1]
                yield [Row(passage_id, vector) for passage_id, _, vector in rows]

        async with effects.begin() as tx:
            tenant_id = _tenant(tx)
        names = await self._index.replace(tenant_id, document.owner, "document", batches)
        async with effects.begin() as tx:
            await documents.mark_indexed(tx, document.id, names)


class _ParserDied(Exception):
    """The parser process ended before the end of the document."""


@dataclass
class Findings:
    """The remarks of the parser about a document, complete after its last passage."""

    pages: int | None = None
    pages_without_text: list[int] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


Check = Callable[[], Awaitable[None]]
"""Raises NotFound if the document was deleted meanwhile."""


async def _parsed(file: IO[bytes], type_: str, findings: Findings, check: Check) -> AsyncGenerator[list[Chunk], None]:
    """The file's passages in batches. Fills `findings`. Raises _Refused and NotFound."""
    for is_last in (False, True):
        given = False
        try:
            async with aclosing(_parsed_once(file, type_, findings, check)) as parts:
                async for chunks in parts:
                    yield chunks
                    given = True
            return
        except _ParserDied:
            # A process can die for reasons other than its file. A second death is blamed on the file.
            if is_last or given:
                raise _Refused("The file cannot be read: the parser crashes on it.") from None


async def _parsed_once(
    file: IO[bytes], type_: str, findings: Findings, check: Check
) -> AsyncGenerator[list[Chunk], None]:
    """The file's passages from one parser process. Raises _Refused, _ParserDied and NotFound."""
    # A parser that a file has taken over must not find the service's secrets in its memory.
    confinement.hide_memory()
    file.seek(0)
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.memory.parsing",
            type_,
            str(os.getpid()),
            stdin=file,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            cwd=_ROOT,
            # Without the service's variables, for the same reason.
            env={"PYTHONUTF8": "1"},
            limit=2**22,
        )
        chunks: list[Chunk] = []
        complete = False
        try:
            async with aclosing(_lines(process, check)) as lines:
                async for line in lines:
                    said = msgspec.json.decode(line)
                    if "error" in said:
                        raise _Refused(said["error"])
                    if "unconfined" in said:
                        _log.warning("parser process is not fully confined", missing=said["unconfined"])
                    if "text" in said:
                        chunks.append(Chunk(**said))
                    if complete := "chunks" in said:
                        findings.pages = said["pages"]
                        findings.pages_without_text = said["pages_without_text"]
                        findings.warnings = said["warnings"]
                    if len(chunks) == _STORE_ROWS:
                        yield chunks
                        chunks = []
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if not complete:
            if process.returncode == -signal.SIGXCPU:
                raise _Refused(f"The file could not be read within {confinement.MAX_CPU_SECONDS} s of processor time.")
            errors.seek(0)
            output = errors.read()[-2000:].decode(errors="replace")
            _log.error("parser process died", code=process.returncode, output=output)
            raise _ParserDied
        yield chunks


async def _lines(process: asyncio.subprocess.Process, check: Check) -> AsyncGenerator[bytes, None]:
    """The lines of a parser process. Raises _Refused after PARSE_SECONDS, and NotFound."""
    assert process.stdout is not None
    deadline = time.monotonic() + PARSE_SECONDS
    while True:
        reading = asyncio.ensure_future(process.stdout.readline())
        try:
            while not (await asyncio.wait({reading}, timeout=CHECK_SECONDS))[0]:
                if time.monotonic() > deadline:
                    raise _Refused(f"The file could not be read within {PARSE_SECONDS / 60:g} minutes.")
                await check()
        finally:
            reading.cancel()
        if not (line := reading.result()):
            return
        yield line


async def _advance(tx: Tx, id_: UUID, status: str, progress: float) -> None:
    if not await documents.advance(tx, id_, status, progress):
        raise _Deleted


def _tenant(tx: Tx) -> str:
    assert tx.tenant_id is not None
    return tx.tenant_id
