"""Audit: acts that must be accounted for. Every service publishes them; the log aggregator chains them by hash."""

from __future__ import annotations

from typing import Literal

import msgspec

from protos.envelope import Message
from protos.messages import Timestamp


class ActAudited(Message, frozen=True, kw_only=True):
    """An actor did, or tried to do, something that must be accounted for."""

    tenant_id: str | None
    """The owner of the chain; null for the chain of the system. In the body, because acts are read in batches."""
    at: Timestamp
    actor: str
    """``user:<id>``, ``api_key:<id>``, ``operator`` or ``service:<name>``."""
    action: str
    """The act, such as ``dead_letter.redrive``."""
    object_kind: str
    """The kind of the object that the act changed, such as ``dead_letter``."""
    object_id: str
    outcome: Literal["done", "denied", "failed"]
    details: dict[str, str] = msgspec.field(default_factory=dict)
    """Further facts; no secret and no personal content, because the record is kept 90 days."""
