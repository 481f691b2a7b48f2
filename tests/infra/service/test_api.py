"""The base of administrative HTTP: scopes, errors that name the field, pages, and one answer per idempotency key."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, cast
from urllib.parse import quote
from uuid import uuid4

import httpx
import msgspec
import pytest
from fastapi import APIRouter, Query, Request, Response
from prometheus_client import CollectorRegistry
from pydantic import BaseModel, ConfigDict
from redis.asyncio import Redis

from infra.errors import Conflict, NotFound, TooManyRequests
from infra.observe import logs
from infra.observe.metrics import Metrics
from infra.outgoing import shares
from infra.postgres.database import Database
from infra.postgres.tx import Tx
from infra.security.auth import IDENTITY_HEADER, Identities, Identity
from infra.security.crypto import Cipher
from infra.service import maintenance, refusals
from infra.service.api import (
    MAX_A_SECOND,
    MAX_LARGE_BODIES,
    Admin,
    Operator,
    Paging,
    Rates,
    Reader,
    Runner,
    Viewer,
    Writer,
    api,
    page,
)
from infra.service.idempotency import ShownOnce, once
from infra.service.maintenance import prune_answers
from infra.service.service import Runtime
from infra.web import http
from infra.web.http import create_app
from infra.web.json_text import LARGE_BYTES
from tooling.testing import keys
from tooling.testing.stack import Stack
from tooling.testing.until import until

KEY = "bWFkZSB1cCwgMzIgYnl0ZXMgb2Yga2V5IG1hdGVyaWE="


class Limits(BaseModel):
    steps: int


class NewThing(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    limits: Limits | None = None
    tools: list[int] = []


class Thing(BaseModel):
    name: str
    number: int
    key: Annotated[str, ShownOnce(lambda key: key[:4])] = "plaintext-of-a-key"


@dataclass
class Parts:
    """The parts of the runtime that these routes use."""

    identities: Identities
    cipher: Cipher
    request: Database
    worker: Database
    cache: Redis


class Made:
    def __init__(self) -> None:
        self.count = 0
        self.fail = False
        self.may_end = asyncio.Event()


@pytest.fixture
def made() -> Made:
    return Made()


@pytest.fixture
async def client(desk: Database, made: Made, stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    cache = Redis.from_url(stack.redis_url)
    parts = cast(Runtime, Parts(keys.identities("agent"), Cipher(KEY), desk, desk, cache))
    router = APIRouter()

    @router.post("/things", status_code=201, response_model=Thing)
    async def create(body: NewThing, who: Writer, request: Request) -> Response:
        async def work(tx: Tx) -> tuple[int, Thing]:
            made.count += 1
            if made.fail:
                raise Conflict("somebody else was first")
            return 201, Thing(name=body.name, number=made.count)

        return await once(request, parts, who, work)

    @router.post("/slow")
    async def slow(body: dict[str, str], who: Writer) -> None:
        made.count += 1
        await made.may_end.wait()

    @router.get("/read")
    async def read(who: Reader) -> str:
        assert shares.tenant.get() == logs._work.get().get("for_tenant", "") == who.tenant_id
        return who.tenant_id

    @router.get("/run")
    async def run(who: Runner) -> str:
        return who.actor

    @router.get("/admin")
    async def admin(who: Admin) -> str:
        return who.actor

    @router.get("/operator")
    async def operator(who: Operator) -> str:
        return who.actor

    @router.get("/view")
    async def view(who: Viewer) -> str:
        return who.actor

    @router.get("/numbers")
    async def numbers(who: Reader, paging: Paging, step: Annotated[int, Query(ge=1)] = 1) -> dict[str, Any]:
        found = list(range(int(paging.after or 0) + step, 8, step))[: paging.limit + 1]
        return page(found, paging, str)

    @router.get("/times")
    async def times(who: Reader, paging: Paging) -> str:
        return str(paging.after_time(int))

    @router.get("/things/{thing_id}/{name}")
    async def missing(thing_id: str, name: str, who: Reader) -> None:
        raise NotFound("no such thing")

    @router.get("/cast")
    async def cast_(who: Reader, request: Request) -> str:
        value = bytes.fromhex(request.query_params["hex"]).decode()
        async with desk.begin() as tx:
            return str(await tx.sql(f"SELECT $1::text::{request.query_params['type']}", value))

    app = create_app(api("test", parts, router), http.Health("test", "1"), Metrics(CollectorRegistry()))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://api", headers=identity()) as running:
        yield running
    await cache.aclose()


def identity(tenant: str = "t1", *scopes: str) -> dict[str, str]:
    who = Identity(
        "api_key:k1" if tenant else "operator", tenant, frozenset(scopes or ("read", "run", "write", "admin"))
    )
    return {IDENTITY_HEADER: keys.identity_token(who)}


@pytest.mark.parametrize(
    ("path", "scope"), [("/read", "read"), ("/run", "run"), ("/admin", "admin"), ("/things", "write")]
)
async def test_a_client_without_the_scope_is_refused_and_told_which_one_is_missing(
    client: httpx.AsyncClient, path: str, scope: str
) -> None:
    others = {"read", "run", "write", "admin"} - {scope}
    method = "POST" if path == "/things" else "GET"
    body = {"json": {"name": "a"}} if method == "POST" else {}
    answer = await client.request(method, path, headers=identity("t1", *others), **cast(Any, body))
    assert (answer.status_code, answer.json()["detail"]) == (403, f"the scope {scope} is missing")
    assert (await client.request(method, path, headers=identity("t1", scope), **cast(Any, body))).status_code < 300


async def test_refusals_are_in_the_audit_chain_of_the_client_and_bounded(
    client: httpx.AsyncClient, desk: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant, thing = str(uuid4()), str(uuid4())
    monkeypatch.setattr(refusals, "PER_MINUTE", 3)
    assert (await client.get("/admin", headers=identity(tenant, "read"))).status_code == 403
    for _ in range(5):
        path = f"/things/{thing}/somebody@example.org"
        assert (await client.get(path, headers=identity(tenant, "read"))).status_code == 404
    async with desk.begin() as tx:
        rows = await tx.sql(
            "SELECT body FROM outbox WHERE destination = 'audit.logs' AND key = $1 ORDER BY position", tenant
        )
    acts = [msgspec.json.decode(body) for (body,) in rows]
    missing = ("api_key:k1", "request.refuse", "GET /things/{thing_id}/{name}", "denied")
    assert [(act["actor"], act["action"], act["object_id"], act["outcome"]) for act in acts] == [
        ("api_key:k1", "request.refuse", "GET /admin", "denied"),
        missing,
        missing,
    ]
    assert [act["details"] for act in acts] == [{"status": "403"}, *[{"status": "404", "thing_id": thing}] * 2]


async def test_a_tenant_with_many_keys_has_one_limit_and_others_have_theirs(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.service.api.MAX_A_SECOND", 0)
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(http._log, "info", lambda _, **data: lines.append({**logs._work.get(), **data}), raising=False)
    answer = await client.get("/read", headers=identity("t1", "read"))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert [(line["status"], line.get("for_tenant")) for line in lines] == [(429, "t1")], (
        "the operator finds who floods"
    )
    assert (await client.get("/view", headers=identity(""))).status_code == 200


async def test_a_tenants_large_bodies_leave_places_to_others_and_small_ones_do_not_wait(
    client: httpx.AsyncClient, made: Made
) -> None:
    large = b'{"name": "a"' + b" " * LARGE_BYTES + b"}"

    async def post(tenant: str, body: bytes) -> int:
        headers = {**identity(tenant), "content-type": "application/json"}
        return (await client.post("/slow", headers=headers, content=body)).status_code

    posted = [asyncio.create_task(post("t1", large)) for _ in range(MAX_LARGE_BODIES)]
    await until(lambda: asyncio.sleep(0, made.count >= MAX_LARGE_BODIES // 2))
    posted += [asyncio.create_task(post("t1", b"{}")), asyncio.create_task(post("t2", large))]
    await until(lambda: asyncio.sleep(0, made.count >= MAX_LARGE_BODIES // 2 + 2))
    assert made.count == MAX_LARGE_BODIES // 2 + 2
    made.may_end.set()
    assert {*await asyncio.gather(*posted)} == {200}
    assert made.count == MAX_LARGE_BODIES + 2


def test_requests_are_counted_by_tenant_and_second() -> None:
    rates = Rates()
    for n in range(MAX_A_SECOND):
        rates.count("t1", 7 + n / MAX_A_SECOND)
        rates.count("", 7.0)
    with pytest.raises(TooManyRequests):
        rates.count("t1", 7.9)
    rates.count("t2", 7.9)
    rates.count("", 7.9)
    rates.count("t1", 8.0)


async def test_operator_routes_refuse_tenants_and_tenant_routes_refuse_the_operator(
    client: httpx.AsyncClient,
) -> None:
    assert (await client.get("/operator")).status_code == 403
    assert (await client.get("/operator", headers=identity(""))).json() == "operator"
    assert (await client.get("/read", headers=identity(""))).status_code == 403
    assert (await client.get("/view", headers=identity(""))).status_code == 200


async def test_a_missing_or_forged_identity_is_refused(client: httpx.AsyncClient) -> None:
    del client.headers[IDENTITY_HEADER]
    assert (await client.get("/view")).status_code == 401
    who = Identity("api_key:k1", "t1", frozenset(("read",)))
    forged = {IDENTITY_HEADER: keys.identities("user").token(who, "billing")}
    answer = await client.get("/view", headers=forged)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert (await client.get("/view", headers={IDENTITY_HEADER: "nonsense"})).status_code == 401
    who = replace(who, token=keys.identities("user").token(who, "ws_gateway"))
    another = {IDENTITY_HEADER: keys.identities("ws_gateway").on_behalf(who, "agent")}
    assert (await client.get("/view", headers=another)).status_code == 403


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"name": 1}', "name"),
        ("{}", "name"),
        ('{"name": "a", "limits": {"steps": "many"}}', "limits.steps"),
        ('{"name": "a", "tools": [1, "x"]}', "tools[1]"),
        ('{"name": "a", "colour": "red"}', "colour"),
        ('{"name": ', "body"),
        ("", "body"),
    ],
)
async def test_a_wrong_body_is_a_problem_that_names_the_field(client: httpx.AsyncClient, body: str, field: str) -> None:
    answer = await client.post("/things", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert [error["field"] for error in answer.json()["errors"]] == [field]


async def test_a_body_of_another_type_than_json_is_refused_as_such(client: httpx.AsyncClient) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = await client.post("/things", content='{"name": "a"}', headers={"content-type": kind})
        assert (answer.status_code, answer.json()["detail"]) == (415, "content-type: must be application/json"), kind
    for kind in ("application/JSON; charset=utf-8", "application/merge-patch+json"):
        headers = {"content-type": kind}
        assert (await client.post("/things", content='{"name": "a"}', headers=headers)).status_code == 201
        assert (await client.post("/things", content="[]", headers=headers)).status_code == 422


NESTED = "[" * 900 + "]" * 900


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"name": "a\\u0000b"}', "name"),
        ('{"name": "\\ud800"}', "name"),
        ('{"name": "\\uDFFFx"}', "name"),
        ('{"a\\u0000": 1}', "body"),
        ('{"name": "a", "limits": {"steps": "\\u0000"}}', "limits.steps"),
        (f'{{"name": {NESTED}}}', "body"),
        (f'{{"name": {NESTED * 100}}}', "body"),
        ("[" * 100_000, "body"),
    ],
)
@pytest.mark.parametrize("kind", ["application/json", "application/merge-patch+json"])
async def test_a_body_that_no_store_can_hold_is_refused_with_its_field(
    client: httpx.AsyncClient, body: str, field: str, kind: str
) -> None:
    headers = {"content-type": kind}
    answer = await client.post("/things", content=body.encode("latin-1"), headers=headers)
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"][0]["field"] == field


async def test_escapes_that_are_text_are_not_mistaken_for_nul_or_surrogates(client: httpx.AsyncClient) -> None:
    body = r'{"name": "\\u0000 \ud83d\ude00 \\ud800"}'
    answer = await client.post("/things", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["name"]) == (201, r"\u0000 😀 \ud800")


@pytest.mark.parametrize(
    "cursor",
    ["é", "%C3%A9", "AAAA", "/w==", "a", "%00", base64.urlsafe_b64encode(b"9" * 5_000).decode(), "\udcff"],
)
async def test_a_cursor_that_no_page_gave_is_refused(client: httpx.AsyncClient, cursor: str) -> None:
    answer = await client.get(f"/times?cursor={quote(cursor, errors='surrogateescape')}")
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"][0]["field"] in ("cursor", "query")


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-01-01T00:00:00", "x"])
async def test_a_cursor_with_a_time_out_of_range_is_refused(client: httpx.AsyncClient, time: str) -> None:
    cursor = base64.urlsafe_b64encode(f"{time} 1".encode()).decode()
    answer = await client.get("/times", params={"cursor": cursor})
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "cursor")


@pytest.mark.parametrize("value", ["\0", "9" * 30, "2026-01-01 00:00:00+99999"])
@pytest.mark.parametrize("type_", ["text", "bigint", "timestamptz"])
async def test_a_value_that_the_database_refuses_is_not_an_error_inside(
    client: httpx.AsyncClient, value: str, type_: str
) -> None:
    answer = await client.get("/cast", params={"type": type_, "hex": value.encode().hex()})
    assert answer.status_code == (200 if type_ == "text" and "\0" not in value else 422), answer.text


async def test_nul_in_a_query_or_path_is_refused(client: httpx.AsyncClient) -> None:
    assert (await client.get("/read?q=a%00b")).status_code == 422
    assert (await client.get("/read%00")).status_code == 404


async def test_a_list_is_read_page_by_page(client: httpx.AsyncClient) -> None:
    seen: list[int] = []
    cursor: dict[str, str] = {}
    while True:
        answer = (await client.get("/numbers", params={"limit": 3, **cursor})).json()
        seen += answer["items"]
        if answer["next"] is None:
            break
        cursor = {"cursor": answer["next"]}
    assert seen == [1, 2, 3, 4, 5, 6, 7]
    for params, field in (({"limit": "0"}, "limit"), ({"cursor": "%%%"}, "cursor"), ({"step": "0"}, "step")):
        problem = await client.get("/numbers", params=params)
        assert (problem.status_code, problem.json()["errors"][0]["field"]) == (422, field)


async def test_the_same_key_gets_the_first_answer_and_nothing_is_made_again(
    client: httpx.AsyncClient, made: Made
) -> None:
    sent = [client.post("/things", json={"name": "a"}, headers={"Idempotency-Key": "k-1"}) for _ in range(5)]
    answers = await asyncio.gather(*sent)
    assert {(answer.status_code, answer.json()["name"], answer.json()["number"]) for answer in answers} == {
        (201, "a", 1)
    }
    assert made.count == 1
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 4


async def test_a_secret_is_in_the_first_answer_only_and_is_not_stored(
    client: httpx.AsyncClient, desk: Database
) -> None:
    headers = {"Idempotency-Key": "k-5"}
    first, again = [await client.post("/things", json={"name": "a"}, headers=headers) for _ in range(2)]
    assert first.json()["key"] == "plaintext-of-a-key"
    assert again.json() == {**first.json(), "key": "plai… (shown only in the first answer)"}
    async with desk.begin() as tx:
        [(sealed,)] = await tx.sql("SELECT answer FROM idempotency WHERE key = 'k-5'")
    assert b"plaintext" not in Cipher(KEY).open(sealed, "idempotency", "t1", "POST /things", "k-5")


async def test_an_answer_expires_after_a_day(client: httpx.AsyncClient, made: Made, desk: Database) -> None:
    keys = [{"Idempotency-Key": "fresh"}, {"Idempotency-Key": "old"}]
    for key in keys:
        await client.post("/things", json={"name": "a"}, headers=key)
    async with desk.begin() as tx:
        await tx.sql("UPDATE idempotency SET created_at = created_at - interval '1 day' WHERE key = 'old'")
    again = [await client.post("/things", json={"name": "a"}, headers=key) for key in keys]
    assert ["idempotent-replayed" in answer.headers for answer in again] == [True, False]
    assert made.count == 3
    # A new answer under the old key counts from its own time.
    assert (await client.post("/things", json={"name": "b"}, headers=keys[1])).status_code == 422
    async with desk.begin() as tx:
        await tx.sql("UPDATE idempotency SET created_at = created_at - interval '1 day' WHERE key = 'old'")
    async with desk.begin() as tx:
        await prune_answers(tx)
        left = await tx.sql("SELECT key FROM idempotency WHERE key IN ('fresh', 'old')")
    assert left == [("fresh",)]


async def test_a_table_that_cannot_be_pruned_does_not_keep_the_others_from_it(
    client: httpx.AsyncClient, desk: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(tx: Tx) -> None:
        await tx.sql("SELECT 1 FROM no_such_table")

    async def is_kept(key: str) -> bool:
        async with desk.begin() as tx:
            return bool(await tx.sql("SELECT 1 FROM idempotency WHERE key = $1", key))

    await client.post("/things", json={"name": "a"}, headers={"Idempotency-Key": "older"})
    async with desk.begin() as tx:
        await tx.sql("UPDATE idempotency SET created_at = created_at - interval '1 day' WHERE key = 'older'")
    monkeypatch.setattr(maintenance, "PRUNING", (broken, *maintenance.PRUNING))
    work = maintenance.Maintenance(desk, Metrics(CollectorRegistry()))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(work.run())
        async with asyncio.timeout(30):
            while await is_kept("older"):
                await asyncio.sleep(0.02)
        await work.stop()


async def test_a_key_with_another_body_is_refused_and_other_tenants_keys_are_others(
    client: httpx.AsyncClient, made: Made
) -> None:
    key = {"Idempotency-Key": "k-2"}
    await client.post("/things", json={"name": "a"}, headers=key)
    answer = await client.post("/things", json={"name": "b"}, headers=key)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "Idempotency-Key")
    assert (await client.post("/things", json={"name": "b"}, headers=key | identity("t2"))).status_code == 201
    assert made.count == 2
    for wrong in ("", "x" * 256):
        assert (await client.post("/things", json={"name": "a"}, headers={"Idempotency-Key": wrong})).status_code == 422


async def test_a_failed_answer_is_not_remembered(client: httpx.AsyncClient, made: Made) -> None:
    key = {"Idempotency-Key": "k-3"}
    made.fail = True
    assert (await client.post("/things", json={"name": "a"}, headers=key)).status_code == 409
    made.fail = False
    assert (await client.post("/things", json={"name": "a"}, headers=key)).status_code == 201


async def test_a_remembered_answer_is_sealed(client: httpx.AsyncClient, desk: Database) -> None:
    await client.post("/things", json={"name": "shown-only-once"}, headers={"Idempotency-Key": "k-4"})
    async with desk.begin() as tx:
        [(answer,)] = await tx.sql("SELECT answer FROM idempotency WHERE key = 'k-4'")
    assert b"shown-only-once" not in answer


async def test_the_page_of_the_api_needs_nothing_from_elsewhere(client: httpx.AsyncClient) -> None:
    html = (await client.get("/docs/")).text
    assert "//" not in html.replace("// ", "")
    assert "/things" in (await client.get("/docs/openapi.json")).json()["paths"]
    assert (await client.get("/docs/static/swagger-ui-bundle.js")).status_code == 200


async def test_the_page_runs_its_own_scripts_only(client: httpx.AsyncClient) -> None:
    answer = await client.get("/docs/")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    [script] = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == f"'self' 'sha256-{digest}'"
    # Handlers in attributes would need another permission.
    assert not re.search(r"<[^>]+ on\w+=", answer.text)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:1", ""])
async def test_the_redirect_of_a_slash_names_no_host(client: httpx.AsyncClient, host: str) -> None:
    answer = await client.get("/things/?a=b", headers={"host": host})
    assert (answer.status_code, answer.headers["location"]) == (307, "/things?a=b")


async def test_unknown_paths_and_methods_are_problems_too(client: httpx.AsyncClient) -> None:
    for method, path, status in (("GET", "/nowhere", 404), ("DELETE", "/things", 405)):
        answer = await client.request(method, path)
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
