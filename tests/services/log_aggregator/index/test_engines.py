"""The requests with which the index prepares Elasticsearch and OpenSearch, against servers with the same answers.

The other tests run against a real OpenSearch without the plugin for policies. Elasticsearch cannot be installed here.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from infra.clock import utcnow
from infra.errors import Transient
from infra.outgoing import shares
from services.log_aggregator.index.documents import IndexedDocument
from services.log_aggregator.index.search_index import SEARCHES_AT_ONCE, SearchIndex
from tooling.testing.until import until

ELASTICSEARCH = {"number": "9.2.0", "build_flavor": "default", "build_type": "docker"}
OPENSEARCH = {"distribution": "opensearch", "number": "3.2.0"}
UNKNOWN_SETTING = {"error": {"reason": "unknown setting [index.lifecycle.name]"}, "status": 400}


@contextmanager
def server(version: dict[str, str], policy_status: int = 200) -> Iterator[tuple[str, list[tuple[str, str, Any]]]]:
    """Yields the server's address and the requests that it got: method, path, JSON."""
    asked: list[tuple[str, str, Any]] = []

    class Engine(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            path = self.path.partition("?")[0]
            body = self.rfile.read(int(self.headers.get("content-length", "0")))
            asked.append((self.command, path, json.loads(body) if body and path != "/_bulk" else None))
            status, answer = self._found(path)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _found(self, path: str) -> tuple[int, Any]:
            if self.command == "HEAD":
                return 404, {}
            if path == "/":
                return 200, {"version": version}
            if "polic" in path:
                return policy_status, {"acknowledged": policy_status == 200}
            if path.startswith("/_index_template/"):
                settings = asked[-1][2]["template"]["settings"]
                if version is OPENSEARCH and "index.lifecycle.name" in settings:
                    return 400, UNKNOWN_SETTING
                return 200, {"acknowledged": True}
            return 200, [] if path.startswith("/_cat/") else {"errors": False, "items": []}

        do_GET = do_PUT = do_POST = do_HEAD = _answer

        def log_message(self, format: str, *_: object) -> None:
            """Nothing."""

    running = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    thread = Thread(target=running.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}", asked
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


def document() -> IndexedDocument:
    return IndexedDocument("1", utcnow(), {"id": "1"})


async def test_elasticsearch_gets_a_lifecycle_policy_before_the_template_that_names_it() -> None:
    with server(ELASTICSEARCH) as (url, asked):
        await SearchIndex(url, "").store("audit", [document()])
    puts = [(path, body) for method, path, body in asked if method == "PUT"]
    assert [path for path, _ in puts] == ["/_ilm/policy/clawbus-audit", "/_index_template/clawbus-audit"]
    assert puts[0][1]["policy"]["phases"]["delete"]["min_age"] == "91d"
    assert puts[1][1]["template"]["settings"]["index.lifecycle.name"] == "clawbus-audit"
    assert asked[-1][:2] == ("POST", "/_bulk")


async def test_elasticsearch_that_refuses_the_policy_gets_no_documents() -> None:
    """Without the right `manage_ilm` the template would name a policy that does not exist."""
    refused = pytest.raises(Transient, match="_ilm/policy/clawbus-logs: 403")
    with server(ELASTICSEARCH, policy_status=403) as (url, asked), refused:
        await SearchIndex(url, "").store("logs", [document()])
    assert not [path for method, path, _ in asked if method == "POST"]


@pytest.mark.parametrize("policy_status", [201, 409, 400])
async def test_opensearch_is_used_with_a_new_a_known_and_without_a_policy(policy_status: int) -> None:
    with server(OPENSEARCH, policy_status) as (url, asked):
        await SearchIndex(url, "").store("events", [document()])
    puts = [path for method, path, _ in asked if method == "PUT"]
    assert puts == ["/_plugins/_ism/policies/clawbus-events", "/_index_template/clawbus-events"]
    assert asked[-1][:2] == ("POST", "/_bulk")


async def test_a_request_has_a_most_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine refuses a larger one as a whole, again and again."""
    documents = [IndexedDocument(str(n), utcnow(), {"id": str(n), "text": "x" * 100}) for n in range(5)]
    monkeypatch.setattr("services.log_aggregator.index.search_index.MAX_BULK_BYTES", 450)
    with server(ELASTICSEARCH) as (url, asked):
        await SearchIndex(url, "").store("events", documents)
    assert [path for method, path, _ in asked if method == "POST"] == ["/_bulk"] * 3


async def test_a_tenants_searches_leave_connections_to_the_next_tenant() -> None:
    held = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal held
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        body = await reader.readexactly(int(head.partition("content-length: ")[2].split()[0]))
        if b"hostile" in body:
            held += 1
            # Until the client goes away.
            await reader.read()
        else:
            content = b'{"hits": {"hits": []}}'
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content))
        writer.close()

    async def search(name: str) -> list[dict[str, Any]]:
        shares.work_for(name)
        return await index.search("logs", [{"term": {"tenant": name}}], [], 1)

    slow = await asyncio.start_server(serve, "127.0.0.1", 0)
    index = SearchIndex(f"http://127.0.0.1:{slow.sockets[0].getsockname()[1]}", "")
    # The client has a hundred connections.
    searches = [asyncio.create_task(search("hostile")) for _ in range(150)]
    await until(lambda: asyncio.sleep(0, held >= SEARCHES_AT_ONCE // 2))
    assert await asyncio.create_task(search("other")) == []
    assert held == SEARCHES_AT_ONCE // 2
    for one in searches:
        one.cancel()
    await asyncio.gather(*searches, return_exceptions=True)
    await index.aclose()
    slow.close()
