"""HTTP clients of other services."""

from __future__ import annotations

import ssl
from functools import partial

import httpx


def service_client(service: str, url: str, tls: ssl.SSLContext | None, seconds: float) -> httpx.AsyncClient:
    """A client of `service` at `url`. With TLS its certificate must name the service: its address says nothing."""
    return httpx.AsyncClient(
        base_url=url,
        verify=tls or False,
        trust_env=False,
        timeout=seconds,
        event_hooks={"request": [partial(_name, service)]} if tls else {},
    )


async def _name(service: str, request: httpx.Request) -> None:
    request.extensions["sni_hostname"] = service
