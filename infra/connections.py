"""How this process reaches engines and services by TLS. A server's certificate is always verified, and its name.

The URLs of RabbitMQ (``amqps://…?cafile=&certfile=&keyfile=``) and Valkey (``rediss://…?ssl_ca_certs=&ssl_certfile=&
ssl_keyfile=``) are read by their drivers.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from cryptography import x509

TLS_FILES = ("ca.pem", "certificate.pem", "key.pem")
"""The authority of all, and a service's own certificate and key."""
SCRAM = "SCRAM-SHA-512"
_POSTGRES = ("sslrootcert", "sslcert", "sslkey")
_KAFKA = ("authority", "certificate", "key")
_HTTP = ("cafile", "certfile", "keyfile")


def client_context(authority: str, certificate: str = "", key: str = "") -> ssl.SSLContext:
    """For servers whose certificates `authority` has issued. All are paths of PEM files; the client may have none.

    Raises OSError for a file that cannot be used.
    """
    context = ssl.create_default_context(cafile=authority)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if certificate:
        context.load_cert_chain(certificate, key)
    return context


def context_of(folder: Path) -> ssl.SSLContext:
    """For requests to other services, with the `TLS_FILES` of the folder. Raises OSError."""
    return client_context(*(str(folder / name) for name in TLS_FILES))


def end_of(certificate: Path) -> datetime:
    """The time until which the certificate of a PEM file is valid. Raises OSError, ValueError."""
    return x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc


def postgres_context(query: Mapping[str, Any]) -> tuple[ssl.SSLContext | None, dict[str, Any]]:
    """The context for a PostgreSQL URL with this query, and the rest of the query. None: the URL asks for no TLS.

    Raises ValueError unless ``sslmode`` is verify-full, which alone verifies the server's name, and OSError.
    """
    rest = {name: value for name, value in query.items() if name not in ("sslmode", *_POSTGRES)}
    if rest.keys() == query.keys():
        return None, rest
    if query.get("sslmode") != "verify-full" or "sslrootcert" not in query:
        raise ValueError("sslmode: must be verify-full, with sslrootcert")
    return client_context(*(str(query.get(name, "")) for name in _POSTGRES)), rest


@dataclass(frozen=True)
class HttpTarget:
    """A store that is asked by HTTP or gRPC: ``http://…``, ``https://…``, or ``https://…?cafile=FILE`` with an
    authority of its own, and ``&certfile=FILE&keyfile=FILE`` for mutual TLS."""

    url: str
    """Without the files."""
    authority: str = ""
    """Empty: the authorities of the system."""
    certificate: str = ""
    key: str = ""

    @classmethod
    def parse(cls, url: str) -> HttpTarget:
        """Raises ValueError for another form."""
        parts = urlsplit(url)
        files = dict(parse_qsl(parts.query, keep_blank_values=True))
        wanted = (set(), {_HTTP[0]}, set(_HTTP)) if parts.scheme == "https" else (set(),)
        if parts.scheme not in ("http", "https") or not parts.hostname or files.keys() not in wanted:
            raise ValueError("must be http://host:port, https://host:port or https://…?cafile=FILE")
        return cls(parts._replace(query="").geturl(), *(files.get(name, "") for name in _HTTP))

    def context(self) -> ssl.SSLContext | None:
        """None: the client's own. Raises OSError for a file that cannot be used."""
        return client_context(self.authority, self.certificate, self.key) if self.authority else None


def kafka_options(servers: str) -> dict[str, Any]:
    """The options of an aiokafka client.

    servers: ``host:port,host:port``; or ``kafka://user:password@host:port,…`` with a login by SCRAM-SHA-512; or
    ``kafkas://…?authority=FILE&certificate=FILE&key=FILE`` with TLS too. ``mechanism=PLAIN`` is for the administrator.
    Raises ValueError for another form, and OSError for a file that cannot be used.
    """
    if "://" not in servers:
        return {"bootstrap_servers": servers}
    url = urlsplit(servers)
    login, _, hosts = url.netloc.rpartition("@")
    user, _, password = login.partition(":")
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    mechanism = query.pop("mechanism", SCRAM)
    with_tls = url.scheme == "kafkas"
    allowed, needed = (set(_KAFKA), {"authority"}) if with_tls else (set(), set())
    if (
        url.scheme not in ("kafka", "kafkas")
        or not (user and password and hosts)
        or mechanism not in (SCRAM, "PLAIN")
        or not needed <= query.keys() <= allowed
    ):
        raise ValueError("must be host:port, kafka://user:password@host:port or kafkas://…?authority=FILE")
    return {
        "bootstrap_servers": hosts,
        "security_protocol": "SASL_SSL" if with_tls else "SASL_PLAINTEXT",
        "sasl_mechanism": mechanism,
        "sasl_plain_username": unquote(user),
        "sasl_plain_password": unquote(password),
        "ssl_context": client_context(*(query.get(name, "") for name in _KAFKA)) if with_tls else None,
    }
