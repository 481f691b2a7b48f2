"""Audited acts. Every service publishes them; the log aggregator chains them by hash."""

from __future__ import annotations

from typing import Literal

import msgspec

from protos.envelope import Message
from protos.messages import Timestamp


class ActAudited(Message, frozen=True, kw_only=True):
    """Somebody did, or tried to do, something that must be accounted for.

    tenant_id: whose chain it belongs to; null: the system's own. In the body, for it is read in batches.
    actor: who acted, such as ``user:<id>``, ``api_key:<id>``, ``operator`` or ``service:<name>``.
    action: what was done, such as ``dead_letter.redrive``.
    object_kind, object_id: what it was done to.
    details: what else helps; no secret and no personal content, for it is kept 90 days.
    """

    tenant_id: str | None
    at: Timestamp
    actor: str
    action: str
    object_kind: str
    object_id: str
    outcome: Literal["done", "denied", "failed"]
    details: dict[str, str] = msgspec.field(default_factory=dict)
