"""What the log aggregator reads from the environment."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr

from infra.service.settings import Settings


def _targets(value: str) -> str:
    if not all(name and target for name, target in operations(value).items()):
        raise ValueError("not of the form name=host:port,name=host:port")
    return value


def operations(value: str) -> dict[str, str]:
    """``host:port`` by service."""
    return {name.strip(): target.strip() for name, _, target in (part.partition("=") for part in value.split(","))}


class LogAggregatorSettings(Settings):
    opensearch_url: SecretStr
    """With user and password in it, where there are any."""
    otlp_port: int = Field(ge=0, le=65535)
    """Where spans are received (OTLP over HTTP)."""
    operations: Annotated[str, AfterValidator(_targets)]
    """Where each service serves its operations by gRPC: ``user=host:port,agent=host:port,…``."""
