"""``retrieve-quality``: how often search finds the right page, for each way to search.

Pages are LibreOffice's help in English and Chinese, from Debian's packages. A page's title is the query and the page is
its only right answer; the title is removed from the page. An English title asked of the Chinese pages, and the other
way round, measures the search across languages. The dense search is exact (pgvector without an index), so that the
figures measure the ranking. BM25 is the plain formula (k1 1.2, b 0.75) over the same passages and words, in memory.
"""

from __future__ import annotations

import asyncio
import io
import random
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from html import unescape
from math import log
from pathlib import Path
from typing import Any, NamedTuple, cast
from uuid import UUID

from infra.clock import uuid7
from infra.postgres.database import Database
from infra.postgres.db import create_engine
from infra.postgres.schema import migrate, prepare_database, role_url
from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys
from infra.stores.filetypes import HTML
from infra.stores.objects import Stored
from services.memory.domain import embedded_text
from services.memory.files import parsing
from services.memory.indexes.embeddings import BATCH, LOCAL, LocalEmbedder
from services.memory.indexes.engines import Engines
from services.memory.indexes.index import VectorRow
from services.memory.indexes.models import EmbeddingModels
from services.memory.indexes.pgvector import PgvectorIndex
from services.memory.indexes.vectors import store
from services.memory.knowledge import documents, passages
from services.memory.memories.conversations import Conversations
from services.memory.memories.store import Memories
from services.memory.metering.credit import Credit
from services.memory.rights import of_agent
from services.memory.search.retrieval import DENSE, HYBRID, KEYWORD, Query, Retrieval
from tooling.bench.fixture import Fixture
from tooling.bench.protocol import Units
from tooling.stack.checkout import CHECKOUT
from tooling.testing.packages import extract
from tooling.testing.platform import PASSWORDS
from tooling.testing.service_fakes import HasCredit

PAGES = 150
TOP = 10
PACKAGES = {"en": ("libreoffice-help-en-us", "en-US"), "zh": ("libreoffice-help-zh-cn", "zh-CN")}
_TITLE = re.compile(r"<title>(.*?)</title>", re.DOTALL)
_HEADING = re.compile(r"<h1\b.*?</h1>", re.DOTALL)
# Frames around the text, the same on each page.
_FRAME = re.compile(r"<(header|aside|footer)\b.*?</\1>", re.DOTALL)
_WORDS = re.compile(r"[a-z0-9]+|[\u2e80-\u9fff]+")

Search = Callable[[str, str], Awaitable[list[UUID]]]
"""Language of the pages and query → pages, best first, perhaps with repeats."""


class Page(NamedTuple):
    title: str
    html: str


def fetch() -> dict[str, dict[str, Page]]:
    """Language → path → page, for the pages that both languages have under titles of their own.

    Raises EngineError if the packages cannot be downloaded.
    """
    found: dict[str, dict[str, Page]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for language, (package, place) in PACKAGES.items():
            files = Path(folder) / language
            files.mkdir()
            extract(package, files)
            root = files / "usr/share/libreoffice/help" / place / "text"
            found[language] = {str(path.relative_to(root)): _page(path.read_text()) for path in root.rglob("*.html")}
    english, chinese = found["en"], found["zh"]
    both = sorted(
        path
        for path in english.keys() & chinese.keys()
        if english[path].title != chinese[path].title and len(english[path].html) > 1_500
    )
    chosen = random.Random(7).sample(both, PAGES)
    return {language: {path: pages[path] for path in chosen} for language, pages in found.items()}


def _page(text: str) -> Page:
    title = _TITLE.search(text)
    shown = _FRAME.sub("", _HEADING.sub("", _TITLE.sub("", text)))
    return Page(unescape(title[1]).strip() if title else "", shown)


def words(text: str) -> list[str]:
    """Latin words and numbers; pairs of neighbouring Chinese characters."""
    found = []
    for run in _WORDS.findall(text.lower()):
        found += [run] if run.isascii() or len(run) == 1 else [run[n : n + 2] for n in range(len(run) - 1)]
    return found


class Bm25:
    """Okapi BM25 (Robertson and Zaragoza, 2009) over passages."""

    def __init__(self, texts: Sequence[tuple[UUID, str]]) -> None:
        self._counts = [(page, Counter(words(text))) for page, text in texts]
        self._rows: dict[str, list[int]] = defaultdict(list)
        for n, (_, counts) in enumerate(self._counts):
            for word in counts:
                self._rows[word].append(n)
        self._average = sum(counts.total() for _, counts in self._counts) / len(self._counts)

    def search(self, query: str) -> list[UUID]:
        scores: Counter[int] = Counter()
        for word in set(words(query)):
            rows = self._rows.get(word, [])
            weight = log(1 + (len(self._counts) - len(rows) + 0.5) / (len(rows) + 0.5))
            for n in rows:
                counts = self._counts[n][1]
                length = 0.25 + 0.75 * counts.total() / self._average
                scores[n] += weight * counts[word] * 2.2 / (counts[word] + 1.2 * length)  # type: ignore[assignment]
        return [self._counts[n][0] for n, _ in scores.most_common(10 * TOP)]


async def measure(place: Fixture, progress: Callable[[int, int], None]) -> list[Units]:
    pages = await asyncio.to_thread(fetch)
    await prepare_database(place.admin_url, {"memory": PASSWORDS})
    await migrate(place.admin_url, "memory", CHECKOUT / "services/memory/migrations")
    engines = [
        create_engine(role_url(place.admin_url, "memory", role, getattr(PASSWORDS, role)), pool_size=4)
        for role in ("worker", "request")
    ]
    worker, request = Database(engines[0], "memory"), Database(engines[1], "memory", tenanted=True)
    embedder, cipher, credit = LocalEmbedder(), Cipher("m" * 43 + "="), Credit(cast(Any, HasCredit()))
    index, models = PgvectorIndex(worker, embedder.key), EmbeddingModels(worker, cipher, LOCAL, lambda *_: embedder)
    indexes = Engines(worker, lambda *_: index)
    conversations, memories = Conversations(cipher, models, indexes, credit), Memories(SubjectKeys(cipher))
    retrieval = Retrieval(request, worker, models.active, indexes, conversations, memories, credit)
    ids: dict[str, dict[str, UUID]] = {}
    bm25: dict[str, Bm25] = {}
    total = 2 * PAGES
    for language, by_path in pages.items():
        ids[language], texts = {}, []
        for path, page in by_path.items():
            id_ = ids[language][path] = uuid7()
            texts += [(id_, text) for text in await _store(worker, embedder, index, language, id_, path, page)]
            progress(sum(map(len, ids.values())), total)
        bm25[language] = Bm25(texts)

    def searching(mode: str) -> Search:
        async def search(language: str, query: str) -> list[UUID]:
            answer = await retrieval.search(of_agent(language, ""), Query(query, 5 * TOP, mode=mode), seconds=60)
            if answer.degraded:
                raise ValueError("a search was degraded; no figure is reported")
            return [item.passage.document_id for item in answer.items if item.passage.document_id]

        return search

    async def by_bm25(language: str, query: str) -> list[UUID]:
        return bm25[language].search(query)

    ways: dict[str, Search] = {"BM25": by_bm25} | {mode: searching(mode) for mode in (KEYWORD, DENSE, HYBRID)}
    figures = []
    for asked, answered in (("en", "en"), ("zh", "zh"), ("en", "zh"), ("zh", "en")):
        for way, search in ways.items():
            ranks = []
            for path, page in pages[asked].items():
                order = list(dict.fromkeys(await search(answered, page.title)))[:TOP]
                right = ids[answered][path]
                ranks.append(order.index(right) + 1 if right in order else 0)
            figures.append(_figure(f"{asked} → {answered}, {way}", ranks))
    for engine in engines:
        await engine.dispose()
    return figures


def _figure(measured: str, ranks: Sequence[int]) -> Units:
    recall = sum(rank > 0 for rank in ranks) / len(ranks)
    mrr = sum(1 / rank for rank in ranks if rank) / len(ranks)
    return Units(
        bench="retrieve-quality",
        measure=measured,
        value=100 * recall,
        unit=f"% recall@{TOP}",
        goal=None,
        met=True,
        made_of={f"MRR@{TOP}": mrr, "queries": len(ranks)},
    )


async def _store(
    database: Database, embedder: LocalEmbedder, index: PgvectorIndex, language: str, id_: UUID, path: str, page: Page
) -> list[str]:
    """Stores and indexes one page as the service does. Returns the texts of its passages, with their sections."""
    chunks = list(parsing.passages(parsing.BlockReader(io.BytesIO(page.html.encode()), HTML), HTML))
    stored = Stored(path=path, size=len(page.html), sha256="", content_type=HTML)
    async with database.begin(tenant_id=language) as tx:
        await documents.add(tx, id_, path, stored)
        await passages.add(tx, id_, 0, chunks)
    while True:
        async with database.begin(tenant_id=language) as tx:
            waiting = await passages.without_vector(tx, id_, embedder.key, BATCH)
        if not waiting:
            break
        made = await embedder.passages([embedded_text(each.text, each.section) for each in waiting])
        async with database.begin(tenant_id=language) as tx:
            embedded = {each.id: vector.tobytes() for each, vector in zip(waiting, made.vectors, strict=True)}
            await store(tx, "passage", embedder.key, None, embedded)
    async with database.begin(tenant_id=language) as tx:
        vectors = await passages.with_vectors(tx, id_, embedder.key, -1, len(chunks) + 1)
        await documents.advance(tx, id_, "indexed", 1.0)

    async def batches() -> AsyncIterator[list[VectorRow]]:
        yield [VectorRow(passage_id, vector) for passage_id, _, vector in vectors]

    await index.replace(language, id_, "document", batches())
    return [f"{each.section or ''}\n{each.text}" for each in chunks]
