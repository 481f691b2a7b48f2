"""Reads of personal content are in the audit trail, by the marks of the table of rights.

Every route that answers without a change is called for a tenant whose content has a word of its own. A route that shows
the word and has no mark is red, and so is a mark without a record.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import httpx
import pytest

from infra.security.auth import SCOPES
from tests.security.furnished import CANARY, SPOKEN, Furnished, asked
from tests.security.pages import Operation, filled, operations
from tests.security.rights import READS
from tooling.testing.platform import Platform

pytestmark = pytest.mark.asyncio(loop_scope="package")

SEARCH = "POST /api/v1/memory/search"


async def answered(
    system: Platform, http: Mapping[str, httpx.AsyncClient], op: Operation, other: Furnished, actor: str
) -> str:
    # The search waits for the document.
    body = {"query": f"{CANARY} {SPOKEN}", "after": other.things["documents"]} if op.name == SEARCH else None
    headers = system.headers(other.id, scopes=SCOPES, actor=actor)
    answer = await http[op.service].request(op.method, filled(op.path, other.things), headers=headers, json=body)
    return answer.text


async def test_a_read_of_personal_content_is_audited_and_the_table_names_the_routes_that_show_it(
    system: Platform, http: Mapping[str, httpx.AsyncClient], other: Furnished
) -> None:
    few = asyncio.Semaphore(8)

    async def wrong(op: Operation) -> list[str]:
        if op.method != "GET" and op.name != SEARCH:
            return []
        reader = f"api_key:{uuid4()}"
        async with few:
            text = await answered(system, http, op, other, reader)
        kind = READS[op.service].get(op.name)
        if kind is None:
            return [f"{op}: shows personal content and has no mark"] if SPOKEN in text else []

        async def recorded() -> bool:
            acts = await asked(system, "log_aggregator", other.id, "GET", f"/api/v1/audit?actor={reader}")
            return any(act["object_kind"] == kind for act in acts["items"])

        try:
            await system.until(recorded)
        except TimeoutError:
            return [f"{op}: marked, but no read of a {kind} is in the audit trail"]
        return []

    found = await operations(system)
    assert {op.name for op in found if op.name in READS[op.service]} == {name for of in READS.values() for name in of}
    problems = [line for lines in await asyncio.gather(*map(wrong, found)) for line in lines]
    assert problems == [], "\n".join(problems)


async def test_a_person_who_reads_its_own_words_is_not_recorded(system: Platform, other: Furnished) -> None:
    """The content was made by this client, so it is the person."""
    for service, path in (
        ("agent", f"/api/v1/runs/{other.things['runs']}"),
        ("agent", "/api/v1/runs"),
        ("ws_gateway", f"/api/v1/runs/{other.things['runs']}/events"),
        ("memory", f"/api/v1/memories/{other.things['memories']}"),
    ):
        async with system.client(service, other.id, actor="api_key:test") as client:
            assert (await client.get(path)).status_code == 200
    for service in ("agent", "memory"):
        async with system.database(service).begin() as tx:
            rows = await tx.sql(
                "SELECT kind FROM content_read WHERE tenant_id = $1 AND reader = 'api_key:test' "
                "AND kind IN ('session', 'memory')",
                other.id,
            )
            assert rows == []


async def test_the_operator_who_reads_for_a_tenant_is_in_the_tenants_own_trail(
    system: Platform, other: Furnished
) -> None:
    async with system.client("agent", other.id, actor="operator") as client:
        run = (await client.get(f"/api/v1/runs/{other.things['runs']}")).json()

    async def recorded() -> list[dict[str, Any]]:
        found = await asked(system, "log_aggregator", other.id, "GET", "/api/v1/audit?actor=operator")
        return [act for act in found["items"] if act["action"] == "session.read"]

    [act] = await system.until(recorded)
    assert act["object_id"] == run["session_key"]
    assert len(act["details"]["trace_id"]) == 32
