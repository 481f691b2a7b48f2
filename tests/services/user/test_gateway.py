"""nginx before the real user service: valid and invalid keys."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from tooling.testing.gateway import running_gateway
from tooling.testing.platform import ADMIN_TOKEN, Platform


@pytest.fixture(scope="module")
async def gateway(platform: Platform) -> AsyncIterator[httpx.AsyncClient]:
    """A client without a key; `bearer` gives it one."""
    await platform.prepare("user")
    await platform.start("user")
    async with (
        running_gateway(platform.ports) as url,
        httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as client,
    ):
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def test_from_the_operators_token_to_a_tenants_revoked_key(
    gateway: httpx.AsyncClient, platform: Platform
) -> None:
    assert (await gateway.post("/api/v1/tenants", json={"name": "Acme"})).status_code == 401
    made = await gateway.post("/api/v1/tenants", json={"name": "Acme"}, headers=bearer(ADMIN_TOKEN))
    assert made.status_code == 201
    first = bearer(made.json()["api_key"])
    own = await gateway.get("/api/v1/tenant", headers=first)
    assert (own.status_code, own.json()["id"]) == (200, made.json()["id"])
    # A signed and valid identity of another tenant must not count if it comes from outside.
    forged = platform.headers("another-tenant")
    assert (await gateway.get("/api/v1/tenant", headers=first | forged)).json() == own.json()
    assert (await gateway.get("/api/v1/tenant", headers=forged)).status_code == 401
    key = (await gateway.post("/api/v1/api-keys", json={"name": "ci"}, headers=first)).json()
    assert (await gateway.get("/api/v1/tenant", headers=bearer(key["api_key"]))).status_code == 200
    assert (await gateway.delete(f"/api/v1/api-keys/{key['id']}", headers=first)).status_code == 204

    async def refused() -> bool:
        return (await gateway.get("/api/v1/tenant", headers=bearer(key["api_key"]))).status_code == 401

    await platform.until(refused)


async def test_the_page_of_the_service_and_its_files_are_served(gateway: httpx.AsyncClient) -> None:
    page = await gateway.get("/docs/user/")
    assert page.status_code == 200
    assert "swagger-ui" in page.text
    assert "/api/v1/tenants" in (await gateway.get("/docs/user/openapi.json")).json()["paths"]
    for file in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"):
        assert (await gateway.get(f"/docs/user/static/{file}")).status_code == 200
    health = await gateway.get("/api/health/dependencies")
    assert health.json()["dependencies"]["postgres"]["status"] == "up"


async def test_while_the_user_service_is_away_requests_are_told_to_come_again(
    gateway: httpx.AsyncClient, platform: Platform
) -> None:
    assert platform.stop("user") == 0
    answer = await gateway.get("/api/v1/agents", headers=bearer("claw_unknown"))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.headers["content-type"] == "application/problem+json"
    await platform.start("user")
    assert (await gateway.get("/api/v1/tenant", headers=bearer("claw_unknown"))).status_code == 401
