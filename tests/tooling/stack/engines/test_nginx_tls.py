"""TLS at the gateway: versions, redirect, HSTS."""

from __future__ import annotations

import ssl
import warnings
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from infra.web.server import serve_http
from protos.catalog import SERVICES
from tooling.stack.engines.nginx import Tls
from tooling.testing.certificates import Authority
from tooling.testing.gateway import running_gateway
from tooling.testing.stack import free_port


class Gateway:
    def __init__(self, plain: str, tls: Tls, authority: Authority) -> None:
        self.plain = plain
        self.url = tls.url
        self.authority = authority

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cadata=self.authority.certificate)

    def client(self, context: ssl.SSLContext) -> httpx.AsyncClient:
        return httpx.AsyncClient(verify=context, base_url=self.url, trust_env=False, timeout=30)


@pytest.fixture(scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    async def echo(request: Request) -> Response:
        return JSONResponse({"proto": request.headers.get("x-forwarded-proto"), "host": request.headers.get("host")})

    async def auth(_: Request) -> Response:
        return Response(headers={"X-Claw-Identity": "somebody"})

    server = await serve_http(Starlette(routes=[Route("/internal/auth", auth), Route("/{path:path}", echo)]), 0)
    folder = tmp_path_factory.mktemp("tls")
    authority = Authority()
    certificate, key = authority.issue(folder, "localhost")
    port = free_port()
    tls = Tls(f"127.0.0.1:{port}", f"https://localhost:{port}", str(certificate), str(key))
    async with running_gateway(dict.fromkeys(SERVICES, server.port), tls=tls) as plain:
        yield Gateway(plain, tls, authority)
    await server.stop()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_tls_1_2_and_1_3_are_served_with_hsts(gateway: Gateway, version: ssl.TLSVersion) -> None:
    context = gateway.context()
    context.minimum_version = context.maximum_version = version
    async with gateway.client(context) as client:
        answer = await client.get("/api/v1/agents")
        assert answer.json() == {"proto": "https", "host": gateway.url.removeprefix("https://")}
        assert answer.headers.get_list("strict-transport-security") == ["max-age=31536000; includeSubDomains"]
        assert answer.headers.get_list("x-content-type-options") == ["nosniff"]
        page = await client.get("/docs/")
        assert page.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"


async def test_an_older_version_and_a_cipher_without_authenticated_encryption_are_refused(gateway: Gateway) -> None:
    old = gateway.context()
    with warnings.catch_warnings(action="ignore"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    # Otherwise OpenSSL's own level of security would refuse it here.
    old.set_ciphers("ALL:@SECLEVEL=0")
    weak = gateway.context()
    weak.maximum_version = ssl.TLSVersion.TLSv1_2
    weak.set_ciphers("ECDHE-ECDSA-AES128-SHA256")
    for context in (old, weak):
        async with gateway.client(context) as client:
            with pytest.raises(httpx.ConnectError):
                await client.get("/healthz")


@pytest.mark.parametrize("host", ["evil.example", "localhost"])
async def test_a_plain_request_is_redirected_to_the_gateways_own_address(gateway: Gateway, host: str) -> None:
    async with httpx.AsyncClient(base_url=gateway.plain, trust_env=False, timeout=30) as client:
        for method in ("GET", "POST"):
            answer = await client.request(method, "/api/v1/agents?a=b%20c", headers={"Host": host})
            assert (answer.status_code, answer.headers["location"]) == (308, f"{gateway.url}/api/v1/agents?a=b%20c")
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("//evil.example/x")).headers["location"].startswith(f"{gateway.url}/")


def test_the_key_of_the_certificate_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    _, key = Authority().issue(tmp_path, "localhost")
    assert key.stat().st_mode & 0o777 == 0o600
