"""Every route with every kind of client: only the rights of its line open it, and nothing of another tenant is shown.

The routes come from the OpenAPI pages, so a new route without a line is red.
"""

from __future__ import annotations

import asyncio
import re
from itertools import product
from uuid import uuid4

import grpc
import pytest
import pytest_asyncio

from infra.security.auth import SCOPES
from infra.service.api import OPERATOR
from protos.calls import METHODS
from tests.security.clients import BODIES, OWN_NAMES, Clients, leaks
from tests.security.furnished import CANARY, Furnished, asked
from tests.security.pages import Operation, filled, operations
from tests.security.rights import RIGHTS
from tooling.stack.home import SERVICES
from tooling.testing import keys
from tooling.testing.platform import Platform

pytestmark = pytest.mark.asyncio(loop_scope="package")

# A parameter of a query → the thing that it names.
QUERIES = {
    "agent_id": "agents",
    "run_id": "runs",
    "channel_id": "channels",
    "session_key": "sessions",
    "usage_id": "verdicts",
}


@pytest_asyncio.fixture(loop_scope="package")
async def stranger(system: Platform) -> str:
    """A tenant with an administrator who would like to see them."""
    return str((await asked(system, "user", "", "POST", "/api/v1/tenants", {"name": "Stranger"}))["id"])


async def test_every_route_has_a_line_and_the_rights_of_its_line(system: Platform) -> None:
    found: dict[str, dict[str, tuple[str, ...]]] = {service: {} for service in RIGHTS}
    for op in await operations(system):
        found[op.service][op.name] = op.rights
    assert found == RIGHTS


async def test_only_the_rights_of_its_line_open_a_route(
    routes: list[Operation], clients: Clients, stranger: str
) -> None:
    async def wrong(op: Operation) -> list[str]:
        # Things that do not exist, so that the calls which are let in change nothing.
        path = re.sub(r"\{[^}]+\}", lambda _: str(uuid4()), op.path)
        kinds: dict[str, tuple[str, tuple[str, ...]] | None] = {
            "client without a token": None,
            "member without scopes": (stranger, ()),
            **{scope: (stranger, (scope,)) for scope in SCOPES},
            OPERATOR: ("", SCOPES),
        }
        problems = []
        for kind, who in kinds.items():
            answer = await clients.call(op, path, who)
            status = answer.status_code
            if not op.rights or kind in op.rights:
                good = status < 500 and (status not in (401, 403) or not op.rights)
            else:
                good = status == (401 if who is None else 403)
            if not good:
                problems.append(f"{op} as {kind}: {status} {answer.text[:200]}")
        return problems

    problems = [line for found in await asyncio.gather(*map(wrong, routes)) for line in found]
    assert problems == [], "\n".join(problems)


async def test_another_tenants_thing_is_not_found_and_does_not_change(
    system: Platform, routes: list[Operation], clients: Clients, other: Furnished, stranger: str
) -> None:
    async def wrong(op: Operation) -> list[str]:
        if not op.rights or set(op.rights) == {OPERATOR} or "{" not in op.path:
            return []
        body = BODIES.get(op.name, op.example())
        answer = await clients.call(op, filled(op.path, other.things), (stranger, SCOPES), body)
        good = (answer.status_code == 404 or op.name in OWN_NAMES) and not leaks(answer.text, CANARY, other.id)
        return [] if good else [f"{op}: {answer.status_code} {answer.text[:300]}"]

    problems = [line for found in await asyncio.gather(*map(wrong, routes)) for line in found]
    assert problems == [], "\n".join(problems)
    for (service, path), view in other.views.items():
        assert await asked(system, service, other.id, "GET", path) == view


async def test_no_list_shows_a_thing_of_another_tenant(
    routes: list[Operation], clients: Clients, other: Furnished, stranger: str
) -> None:
    secrets = CANARY, other.id, *other.things.values()
    admin = stranger, SCOPES

    async def wrong(op: Operation) -> list[str]:
        if op.method != "GET" or "{" in op.path or set(op.rights) == {OPERATOR}:
            return []
        names = {parameter["name"] for parameter in op.parameters}
        asking: list[dict[str, str]] = [{}, *({name: other.things[QUERIES[name]]} for name in names & QUERIES.keys())]
        if "tenant_id" in names:
            asking.append({"tenant_id": other.id})
        answers = [(params, await clients.call(op, op.path, admin, **params)) for params in asking]
        return [
            f"{op} {params}: {answer.status_code} {answer.text[:300]}"
            for params, answer in answers
            if answer.status_code >= 500 or leaks(answer.text, *set(secrets) - {*params.values()})
        ]

    problems = [line for found in await asyncio.gather(*map(wrong, routes)) for line in found]
    assert problems == [], "\n".join(problems)


async def test_a_body_cannot_name_a_thing_of_another_tenant(system: Platform, other: Furnished, stranger: str) -> None:
    things = other.things
    colleague = {"agent_id": things["agents"], "name": "other", "description": "x"}
    chat = {"model": things["agents"], "messages": [{"role": "user", "content": "Hello"}]}
    account = {"type": "webhook", "agent_id": things["agents"], "credentials": {"secret": "x", "reply_url": "x"}}
    for service, path, body in (
        ("channel", "/api/v1/channels", account),
        ("user", "/api/v1/api-keys", {"name": "k", "member_id": things["members"]}),
        ("agent", "/api/v1/agents", {"name": "a", "model": "scripted/answer", "agents": [colleague]}),
        ("ws_gateway", "/v1/chat/completions", chat),
        ("ws_gateway", "/v1/responses", {"model": things["agents"], "input": "Hello"}),
    ):
        async with system.client(service, stranger) as client:
            answer = await client.post(path, json=body)
        assert answer.status_code in (404, 422), f"{path}: {answer.text}"
        assert not leaks(answer.text, CANARY, other.id)
    search = {"query": CANARY, "filters": {"document_ids": [things["documents"]]}}
    assert (await asked(system, "memory", stranger, "POST", "/api/v1/memory/search", search))["items"] == []


async def test_only_the_listed_callers_may_call_a_grpc_method(system: Platform, stranger: str) -> None:
    problems = []
    for method, call in METHODS.items():
        owner = method.removeprefix("clawbus.").partition(".")[0]
        # Each service serves its operations, by the same code.
        owner = "agent" if owner == "ops" else owner
        if owner not in SERVICES:
            continue
        async with grpc.aio.insecure_channel(system.grpc(owner)) as channel:
            for caller, behalf in (("", ""), *product(SERVICES, ("tenant", "operator"))):
                tenant = stranger if behalf == "tenant" else ""
                token = keys.callers(caller).token(owner, tenant) if caller else ""
                metadata = (("authorization", f"Bearer {token}"),) if caller else ()
                try:
                    await channel.unary_unary(f"/{method}", request_serializer=bytes)(
                        b"", metadata=metadata, timeout=60
                    )
                    code = grpc.StatusCode.OK
                except grpc.aio.AioRpcError as error:
                    code = error.code()
                listed = caller in call.callers and call.behalf in ("either", behalf)
                wanted = grpc.StatusCode.PERMISSION_DENIED if caller else grpc.StatusCode.UNAUTHENTICATED
                refused = code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
                if refused == listed or (not listed and code != wanted):
                    problems.append(f"{method}: caller {caller!r} for {behalf!r}: {code}")
    assert problems == [], "\n".join(problems)
