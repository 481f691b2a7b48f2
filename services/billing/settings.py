"""What billing reads from the environment."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from infra.service.settings import Settings as Base
from protos.catalog import USAGE_RECORDS


def _targets(value: str) -> str:
    """Raises ValueError where a producer of usage has no address."""
    found = addresses(value)
    if missing := [name for name in USAGE_RECORDS.producers if name not in found]:
        raise ValueError(f"no address of {', '.join(missing)}; expected name=host:port, separated by commas")
    return value


def addresses(value: str) -> dict[str, str]:
    """``host:port`` by service."""
    return {name.strip(): target.strip() for name, _, target in (part.partition("=") for part in value.split(","))}


class Settings(Base):
    operations: Annotated[str, AfterValidator(_targets)]
    """Where each service serves its operations by gRPC: ``user=host:port,agent=host:port,…``."""
