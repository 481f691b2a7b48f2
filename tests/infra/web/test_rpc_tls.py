"""Mutual TLS between services: both sides show a certificate, and a token counts on its service's connection only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from infra.errors import Transient, Unauthenticated
from infra.observe.metrics import Metrics
from infra.web import rpc
from infra.web.rpc import Server, Tls
from infra.web.rpc_client import Channels
from protos.calls import AllowedCallers
from tooling.testing import keys
from tooling.testing.certificates import Authority

SERVICE = "clawbus.test.v1.Test"
METHODS = {f"{SERVICE}/Echo": AllowedCallers(("ws_gateway", "agent"), "either")}


def issue(authority: Authority, folder: Path, name: str) -> Tls:
    certificate, key = authority.issue(folder, name)
    own = folder / name
    own.mkdir()
    certificate.rename(own / "certificate.pem")
    key.rename(own / "key.pem")
    (own / "ca.pem").write_text(authority.certificate)
    return Tls.read(own)


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
async def port(authority: Authority, tmp_path: Path) -> AsyncIterator[int]:
    async def echo(request: bytes, _: Any) -> bytes:
        return rpc.caller().encode()

    metrics = Metrics(CollectorRegistry())
    server = Server("memory", keys.callers("memory"), metrics, METHODS, issue(authority, tmp_path, "memory"))
    handlers: dict[str, Any] = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    server.grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    yield await server.start(0)
    await server.stop()


async def ask(port: int, caller: str, tls: Tls | None, callee: str = "memory") -> bytes:
    channels = Channels(keys.callers(caller), tls)
    try:
        channel = channels.to(f"127.0.0.1:{port}", callee)
        echo: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/Echo")
        return await echo(b"x", timeout=20)
    finally:
        await channels.close()


async def test_services_with_certificates_of_the_authority_talk(
    port: int, authority: Authority, tmp_path: Path
) -> None:
    assert await ask(port, "ws_gateway", issue(authority, tmp_path, "ws_gateway")) == b"ws_gateway"


async def test_a_token_of_another_service_is_worth_nothing_on_this_connection(
    port: int, authority: Authority, tmp_path: Path
) -> None:
    stolen = issue(authority, tmp_path, "channel")
    with pytest.raises(Unauthenticated, match="another service than the connection's certificate"):
        await ask(port, "agent", stolen)


async def test_a_caller_without_a_certificate_or_with_anothers_authority_gets_no_connection(
    port: int, tmp_path: Path
) -> None:
    with pytest.raises(Transient):
        await ask(port, "agent", None)
    with pytest.raises(Transient):
        await ask(port, "agent", issue(Authority(), tmp_path, "agent"))


async def test_a_callee_that_is_another_service_gets_no_call(port: int, authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(Transient, match="billing at"):
        await ask(port, "agent", issue(authority, tmp_path, "agent"), callee="billing")
