"""The search index in Elasticsearch 8 or 9, or in OpenSearch.

One index per day and kind, made from a template and deleted after its retention.

It does not use the client for outgoing HTTP: the index is on a private network, and that client's spans would be
stored in the index, which would make further spans.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import httpx
import msgspec

from infra.clock import utcnow
from infra.connections import HttpTarget
from infra.errors import InvalidMessage, Transient, describe
from infra.observe.logs import get_logger
from infra.outgoing.shares import Shares, tenant
from services.log_aggregator.index import mappings
from services.log_aggregator.index.documents import IndexedDocument
from services.log_aggregator.index.mappings import KEEP, Engine, Kind

CONSUMER_GROUP = "log_aggregator_index"
"""Its offsets are independent of those of the audit chains' reader."""
# Size of one request. OpenSearch accepts 100 MB and is fastest with a few.
MAX_BULK_BYTES = 5_000_000

SEARCHES_AT_ONCE = 20
"""Of a process. A tenant alone has a half: the others' searches would wait behind its own, here and in the index."""
_SEARCH_PAUSES = (0.1, 0.2, 0.5, 0.0)


class SearchIndex:
    """The client of the index. Every method raises Transient while OpenSearch does not answer or refuses requests.

    url: as `HttpTarget` reads it. prefix: separates several systems in one OpenSearch.
    """

    def __init__(self, url: str, prefix: str) -> None:
        target = HttpTarget.parse(url)
        verify = target.context() or True
        self._http = httpx.AsyncClient(base_url=target.url, verify=verify, trust_env=False, timeout=30)
        self._prefix = f"{prefix}clawbus-"
        self._searching = Shares(SEARCHES_AT_ONCE)
        self._log = get_logger("log_aggregator.index")

    async def aclose(self) -> None:
        await self._http.aclose()

    async def ping(self) -> None:
        await self._ask("GET", "/")

    async def store(self, kind: Kind, documents: Sequence[IndexedDocument]) -> None:
        """Stores documents. A document with a known id is overwritten.

        Raises InvalidMessage (field ``document``) if OpenSearch refuses a document because of its content.
        """
        for name in sorted({self._name(kind, document.at) for document in documents}):
            await self._prepare(kind, name)
        for body in self._bulks(kind, documents):
            answer = await self._ask("POST", "/_bulk", content=body, headers={"content-type": "application/x-ndjson"})
            if answer["errors"]:
                _raise(answer["items"])

    async def read(self, kind: Kind, documents: Sequence[IndexedDocument]) -> dict[str, dict[str, Any]]:
        """The stored forms of these documents, by id, without the fields that are only searched."""
        wanted = [{"_index": self._name(kind, document.at), "_id": document.id} for document in documents]
        answer = await self._ask("POST", "/_mget", json={"docs": wanted})
        return {found["_id"]: found["_source"] for found in answer["docs"] if found.get("found")}

    def keeps(self, kind: Kind, document: IndexedDocument) -> bool:
        """False if the index of its day is older than the retention."""
        return self._name(kind, document.at) >= self._name(kind, utcnow() - KEEP[kind])

    async def search(
        self,
        kind: Kind,
        must: Sequence[Mapping[str, Any]],
        sort: Sequence[Mapping[str, str]],
        size: int,
        after: Sequence[Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Returns the documents that match all queries in `must`. after: the sort values of the previous page's end."""
        body = {
            "query": {"bool": {"filter": list(must)}},
            "sort": list(sort),
            "size": size,
            "track_total_hits": False,
            **({"search_after": list(after)} if after else {}),
        }
        # Before the first document there is no index. That is not an error.
        params = {"ignore_unavailable": "true", "allow_no_indices": "true"}
        path = f"/{self._prefix}{kind}-*/_search"
        async with self._searching.place(tenant.get()):
            for pause in _SEARCH_PAUSES:
                answer = await self._send("POST", path, json=body, params=params)
                if answer.status_code != 503:
                    break
                # A new index, or every index after a start of OpenSearch, has no shard for a moment.
                await asyncio.sleep(pause)
        found = _content(answer)
        return [hit["_source"] for hit in found["hits"]["hits"]]

    def _name(self, kind: Kind, at: datetime) -> str:
        return f"{self._prefix}{kind}-{at.astimezone(UTC):%Y.%m.%d}"

    async def _prepare(self, kind: Kind, name: str) -> None:
        """Stores the index template if the index does not exist yet. This also works after OpenSearch was wiped."""
        if (await self._send("HEAD", f"/{name}")).status_code == 200:
            return
        engine = await self._which()
        await self._put_policy(kind, engine)
        template = mappings.template(self._prefix, kind, engine)
        await self._ask("PUT", f"/_index_template/{self._prefix}{kind}", json=template)
        await self._delete_old(kind)

    async def _which(self) -> Engine:
        version = (await self._ask("GET", "/"))["version"]
        return "opensearch" if version.get("distribution") == "opensearch" else "elasticsearch"

    async def _put_policy(self, kind: Kind, engine: Engine) -> None:
        """Stores the policy by which the engine deletes old indices. OpenSearch does not overwrite one that exists.

        An OpenSearch without the plugin refuses the path; then only `_delete_old` deletes.
        """
        path, policy = mappings.policy(self._prefix, kind, engine)
        answer = await self._send("PUT", path, json=policy)
        if engine == "elasticsearch":
            _content(answer)
        elif answer.status_code not in (200, 201, 409):
            self._log.info("the search engine has no index policies; will delete old indices once a day", index=kind)

    async def _delete_old(self, kind: Kind) -> None:
        oldest = self._name(kind, utcnow() - KEEP[kind])
        found = await self._ask("GET", f"/_cat/indices/{self._prefix}{kind}-*", params={"h": "index", "format": "json"})
        for name in sorted(index["index"] for index in found):
            # A name ends with its day, year first.
            if name < oldest:
                await self._ask("DELETE", f"/{name}")
                self._log.info("deleted an index after its retention", index=name)

    def _bulks(self, kind: Kind, documents: Sequence[IndexedDocument]) -> Iterator[bytes]:
        lines: list[bytes] = []
        size = 0
        for document in documents:
            action = {"index": {"_index": self._name(kind, document.at), "_id": document.id}}
            line = msgspec.json.encode(action) + b"\n" + msgspec.json.encode(document.body) + b"\n"
            if lines and size + len(line) > MAX_BULK_BYTES:
                yield b"".join(lines)
                lines, size = [], 0
            lines.append(line)
            size += len(line)
        if lines:
            yield b"".join(lines)

    async def _ask(self, method: str, path: str, **request: Any) -> Any:
        return _content(await self._send(method, path, **request))

    async def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            return await self._http.request(method, path, **request)
        except httpx.HTTPError as error:
            raise Transient(f"OpenSearch does not answer: {describe(error)}") from error


def _content(answer: httpx.Response) -> Any:
    if answer.status_code >= 300:
        asked = f"{answer.request.method} {answer.request.url.path}"
        raise Transient(f"OpenSearch: {asked}: {answer.status_code} {answer.text[:500]}")
    return json.loads(answer.content)


def _raise(items: Sequence[Mapping[str, Any]]) -> None:
    """Raises the error for refused items: InvalidMessage for status 400, Transient for all others (busy, disk full)."""
    refused = [item["index"] for item in items if item["index"]["status"] >= 300]
    for item in refused:
        if item["status"] != 400:
            raise Transient(f"OpenSearch: document {item['_id']}: {item['status']} {item['error']['reason']}")
    raise InvalidMessage("document", f"{refused[0]['_id']}: {refused[0]['error']['reason']}")
