"""Mutual TLS of HTTP between services: both sides show a certificate, and the server's must name the service."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography import x509
from prometheus_client import CollectorRegistry

from infra import VERSION
from infra.connections import TLS_FILES, client_context, context_of
from infra.observe.metrics import Metrics
from infra.service.service import Service
from infra.service.settings import Settings
from infra.web.clients import service_client
from infra.web.http import Health, create_app
from infra.web.server import serve_http
from tooling.testing.certificates import Authority


def issue(authority: Authority, folder: Path, name: str) -> Path:
    own = folder / name
    own.mkdir()
    certificate, key = authority.issue(folder, name)
    (own / TLS_FILES[0]).write_text(authority.certificate)
    certificate.rename(own / TLS_FILES[1])
    key.rename(own / TLS_FILES[2])
    return own


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
async def agent(authority: Authority, tmp_path: Path) -> AsyncIterator[str]:
    """The URL of a server with the agent's certificate, by its address."""
    app = create_app((), Health("agent", VERSION), Metrics(CollectorRegistry()))
    server = await serve_http(app, 0, tls=issue(authority, tmp_path, "agent"))
    yield f"https://127.0.0.1:{server.port}"
    await server.stop()


async def ask(service: str, url: str, tls: ssl.SSLContext) -> int:
    async with service_client(service, url, tls, 20) as client:
        return (await client.get("/healthz")).status_code


async def test_a_client_with_a_certificate_reaches_the_service_that_it_names(
    authority: Authority, agent: str, tmp_path: Path
) -> None:
    own = context_of(issue(authority, tmp_path, "channel"))
    assert await ask("agent", agent, own) == 200
    # The certificate names the address too. That does not count.
    with pytest.raises(httpx.ConnectError, match="certificate"):
        await ask("billing", agent, own)


async def test_a_client_without_a_certificate_of_the_authority_is_refused(
    authority: Authority, agent: str, tmp_path: Path
) -> None:
    own = issue(authority, tmp_path, "channel")
    stranger = issue(Authority(), tmp_path, "stranger")
    anonymous = client_context(str(own / "ca.pem"))
    strange = client_context(str(own / "ca.pem"), str(stranger / "certificate.pem"), str(stranger / "key.pem"))
    for context in (anonymous, strange):
        with pytest.raises(httpx.TransportError):
            await ask("agent", agent, context)
    with pytest.raises(httpx.TransportError):
        async with httpx.AsyncClient(base_url=agent.replace("https", "http"), trust_env=False) as client:
            await client.get("/healthz")


async def test_a_client_refuses_a_server_of_another_authority(agent: str, tmp_path: Path) -> None:
    with pytest.raises(httpx.ConnectError, match="certificate"):
        await ask("agent", agent, context_of(issue(Authority(), tmp_path, "channel")))


async def test_a_service_shows_the_end_of_its_certificate(authority: Authority, tmp_path: Path) -> None:
    own = issue(authority, tmp_path, "agent")
    metrics = Metrics(CollectorRegistry())
    settings = SimpleNamespace(tls_folder=own, grpc_port=None, http_port=0, listen_host="127.0.0.1", share_ports=False)
    runtime: Any = SimpleNamespace(settings=settings, metrics=metrics)
    callers: Any = None
    async with AsyncExitStack() as stack:
        await Service("agent", Settings)._start_servers(runtime, callers, Health("agent", VERSION), stack)
    found = metrics.registry.get_sample_value("claw_certificate_end_timestamp_seconds")
    certificate = x509.load_pem_x509_certificate((own / TLS_FILES[1]).read_bytes())
    assert found == certificate.not_valid_after_utc.timestamp()
