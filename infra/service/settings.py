"""Settings of a service process: read from environment and secret files, and checked before anything starts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from infra.connections import TLS_FILES, HttpTarget, kafka_options, postgres_context
from infra.errors import describe
from infra.security.crypto import Cipher
from infra.security.keys import read_private, read_public

_NOT_USABLE = "the environment of this process is not usable:"


class SettingsError(Exception):
    """The environment is not usable. The message names every bad variable and its fault, never a value."""


def _url(*schemes: str) -> AfterValidator:
    def check(value: SecretStr) -> SecretStr:
        expected = " or ".join(f"{scheme}://" for scheme in schemes)
        try:
            url = urlsplit(value.get_secret_value())
            usable = url.scheme in schemes and bool(url.hostname) and url.port != 0
        except ValueError:
            # The error's text would show the malformed part, which may be the password.
            usable = False
        if not usable:
            raise ValueError(f"must be a URL of the form {expected}user:password@host:port/…")
        if url.scheme == "postgresql":
            _usable(lambda: postgres_context(dict(parse_qsl(url.query))))
        return value

    return AfterValidator(check)


def _usable(read: Callable[[], object]) -> None:
    try:
        read()
    except OSError as error:
        raise ValueError(describe(error)) from None


def _check_brokers(value: SecretStr) -> SecretStr:
    _usable(lambda: kafka_options(value.get_secret_value()))
    return value


def _check_store(value: str) -> str:
    _usable(lambda: HttpTarget.parse(value).context())
    return value


def _check_secret_store(value: SecretStr) -> SecretStr:
    _check_store(value.get_secret_value())
    return value


SecretStoreUrl = Annotated[SecretStr, AfterValidator(_check_secret_store)]
"""With user and password, if the store asks for them."""
StoreUrl = Annotated[str, AfterValidator(_check_store)]
"""The URL of a store: see `HttpTarget`."""


def _readable(read: Callable[[Path], object]) -> Callable[[Path], Path]:
    def check(path: Path) -> Path:
        _usable(lambda: read(path))
        return path

    return check


def _check_tls(folder: Path) -> None:
    for name in TLS_FILES:
        (folder / name).read_bytes()


class Settings(BaseSettings):
    """The variables that every service has, prefix ``CLAW_``. A service with more variables has a subclass.

    If CLAW_SECRETS_FOLDER names a folder, a variable that is not in the environment is read from the folder's file of
    that name. Child processes inherit the environment, and other processes of the user can read it; so it should hold
    no secret.
    """

    # hide_input_in_errors: an error about a malformed secret must not show the secret.
    model_config = SettingsConfigDict(
        env_prefix="CLAW_", env_ignore_empty=True, extra="ignore", frozen=True, hide_input_in_errors=True
    )

    database_url: Annotated[SecretStr, _url("postgresql")]
    """The worker role's URL: relays, consumers and sweepers."""
    request_database_url: Annotated[SecretStr, _url("postgresql")]
    """The request role's URL, bound to one tenant by row-level security."""
    kafka_bootstrap_servers: Annotated[SecretStr, AfterValidator(_check_brokers)]
    """``host:port,…``, or with a login and TLS: see `infra.connections`."""
    topic_prefix: str = ""
    """Stands before the catalog's name in the name of each physical topic."""
    rabbitmq_url: Annotated[SecretStr, _url("amqp", "amqps")]
    redis_url: Annotated[SecretStr, _url("redis", "rediss")]
    listen_host: str = "127.0.0.1"
    """The address on which HTTP and gRPC are served; in a container it must be ``0.0.0.0``."""
    http_port: int = Field(ge=0, le=65535)
    """0 takes a free port."""
    grpc_port: int | None = Field(default=None, ge=0, le=65535)
    share_ports: bool = False
    """Allows a second process of this service on the same ports: it takes over while this process stops."""
    private_key_file: Annotated[Path, AfterValidator(_readable(read_private))]
    """The Ed25519 key (PEM) with which this service signs its tokens; only this service may read it."""
    public_keys_file: Annotated[Path, AfterValidator(_readable(read_public))]
    """The public keys of all services, a JWK set."""
    master_key_file: Annotated[Path, AfterValidator(_readable(Cipher))]
    """The master keys of this service, one a line as base64 of 32 bytes. It seals stored values under the first one."""
    tls_folder: Annotated[Path, AfterValidator(_readable(_check_tls))] | None = None
    """The folder of this service's certificate (``certificate.pem``, ``key.pem``) and of the authority of all
    (``ca.pem``). With it, HTTP and gRPC between services and from the gateway are mutual TLS; all need it, or none."""
    allow_private_targets: bool = False
    """Allows vendors, models and tools on private addresses; for the local stack."""
    otlp_endpoint: str | None = Field(default=None, validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT")
    """The collector's base URL (``http://host:4318``); without it, no spans are sent."""
    trace_ratio: float = Field(default=1.0, ge=0, le=1, validation_alias="OTEL_TRACES_SAMPLER_ARG")
    """The part of new traces that is recorded, 0 to 1. A trace that another process began follows that process."""

    verify_read_models_at: int | None = Field(default=None, ge=0, le=23)
    """The hour (UTC) from which the service verifies its read models, once a day. Without it, it does not."""
    log_level: Literal["debug", "info", "warn", "error"] = "info"
    kafka_session_ms: int = Field(default=10_000, ge=2_000)
    """After this time without a heartbeat, another reader gets the partitions of this one. Milliseconds."""
    lease_seconds: float = Field(default=9.0, ge=0.5)
    """After this time without renewal, another process may take a lease (a relay's buckets, a lane)."""

    @classmethod
    def load(cls) -> Self:
        """Reads the variables. Raises SettingsError naming each variable that is missing or wrong."""
        folder = os.environ.get("CLAW_SECRETS_FOLDER")
        if folder and not Path(folder).is_dir():
            raise SettingsError(f"{_NOT_USABLE}\n  CLAW_SECRETS_FOLDER: {folder} is not a folder")
        try:
            # The values come from the environment and from the folder.
            return cls(_secrets_dir=folder or None)  # type: ignore[call-arg]
        except ValidationError as error:
            lines = [f"  {cls._variable(e['loc'])}: {_reason(e['type'], e['msg'])}" for e in error.errors()]
            raise SettingsError("\n".join([_NOT_USABLE, *lines])) from None

    @classmethod
    def _variable(cls, location: tuple[int | str, ...]) -> str:
        name = str(location[0]) if location else "?"
        return f"{cls.model_config['env_prefix']}{name}".upper() if name in cls.model_fields else name


def _reason(kind: str, message: str) -> str:
    return "missing" if kind == "missing" else message.removeprefix("Value error, ")
