"""Bad input to every operation of every OpenAPI page: it gets an answer that blames the request, never the service."""

from __future__ import annotations

import asyncio
import re
from uuid import uuid4

import httpx
import pytest

from infra.security.auth import SCOPES
from infra.service.api import OPERATOR
from tests.security.bad_input import Bad, requests, times
from tests.security.furnished import furnish
from tests.security.pages import Operation, operations
from tooling.testing.platform import Platform

pytestmark = pytest.mark.asyncio(loop_scope="package")

FROM_EACH = 6
"""The number of bad requests to each operation, spread over its list. All of them would take minutes."""
# These call the payment provider, and the one of this test does not answer.
OUTSIDE = (
    "POST /api/v1/payment-methods",
    "POST /api/v1/invoices/{invoice_id}/pay",
    "POST /api/v1/payments/{payment_id}/refunds",
)


async def asked(
    system: Platform, http: dict[str, httpx.AsyncClient], tenant_id: str, op: Operation, bad: Bad
) -> httpx.Response:
    who = "" if OPERATOR in op.rights else tenant_id
    kind = {"content-type": "application/json"} if bad.body is not None else {}
    given = kind | system.headers(who, scopes=SCOPES) | dict(bad.headers)
    headers = [(name.encode(), value.encode("latin-1")) for name, value in given.items()]
    return await http[op.service].request(op.method, url_of(bad), content=bad.body, headers=headers)


def url_of(bad: Bad) -> str:
    return bad.path + (f"?{bad.query}" if bad.query else "")


def shown(op: Operation, bad: Bad, answer: httpx.Response) -> str:
    body = (bad.body or b"")[:300]
    return f"{op} {url_of(bad)[:200]} {bad.headers} {body!r}: {answer.status_code} {answer.text}"


async def test_bad_input_is_refused_and_never_an_error_of_the_service(
    system: Platform, http: dict[str, httpx.AsyncClient]
) -> None:
    tenant = await furnish(system)
    few = asyncio.Semaphore(8)

    async def failure(op: Operation, bad: Bad) -> str | None:
        async with few:
            answer = await asked(system, http, tenant.id, op, bad)
        unnamed = answer.status_code == 422 and answer.json().get("errors") == []
        if (answer.status_code < 500 and not unnamed) or (answer.status_code == 503 and op.name in OUTSIDE):
            return None
        return shown(op, bad, answer)

    chosen = []
    for op in await operations(system):
        bad = requests(op, {"payments": "stripe"} if op.path.startswith("/webhooks/") else tenant.things)
        chosen += [failure(op, one) for one in bad[:: max(1, len(bad) // FROM_EACH)]]
    found = [line for line in await asyncio.gather(*chosen) if line]
    assert len(chosen) > 600
    assert found == [], "\n".join(found)


async def test_a_time_that_is_none_in_utc_is_refused_with_its_field(
    system: Platform, http: dict[str, httpx.AsyncClient]
) -> None:
    few = asyncio.Semaphore(8)

    async def failure(op: Operation, field: str, bad: Bad) -> str | None:
        async with few:
            answer = await asked(system, http, str(uuid4()), op, bad)
        if answer.status_code == 422 and field in [error["field"] for error in answer.json()["errors"]]:
            return None
        return f"{field}: {shown(op, bad, answer)}"

    # Of things that do not exist: the request is read before they are looked for.
    bad = [
        failure(op, field, one)
        for op in await operations(system)
        for field, one in times(op, re.sub(r"\{[^}]+\}", lambda _: str(uuid4()), op.path))
    ]
    found = [line for line in await asyncio.gather(*bad) if line]
    assert len(bad) > 30
    assert found == [], "\n".join(found)
