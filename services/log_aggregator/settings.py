"""Settings of the log aggregator, read from the environment."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr

from infra.service.settings import SecretStoreUrl, Settings, StoreUrl


def _targets(value: str) -> str:
    if not all(name and target for name, target in operations(value).items()):
        raise ValueError("must have the form name=host:port,name=host:port")
    return value


def operations(value: str) -> dict[str, str]:
    """Returns service → ``host:port``."""
    return {name.strip(): target.strip() for name, _, target in (part.partition("=") for part in value.split(","))}


class LogAggregatorSettings(Settings):
    opensearch_url: SecretStoreUrl
    s3_endpoint: StoreUrl
    """The object store, which keeps the heads of the audit chains."""
    s3_access_key: str
    s3_secret_key: SecretStr
    otlp_port: int = Field(ge=0, le=65535)
    """The port that receives spans (OTLP over HTTP)."""
    operations: Annotated[str, AfterValidator(_targets)]
    """Addresses of the services' operations gRPC: ``user=host:port,agent=host:port,…``."""
