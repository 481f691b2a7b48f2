"""Billing: usage that all services report, and what follows from it. Money is integer nano-units (10⁻⁹)."""

from __future__ import annotations

from uuid import UUID

from protos.envelope import Message
from protos.messages import Count, Timestamp


class UsageRecorded(Message, frozen=True, kw_only=True):
    """Something that costs was used; a failed attempt is usage too. One usage_id debits at most once.

    tenant_id: who pays. In the body, for usage is rated in batches.
    usage_id: contains the attempt, such as ``<run id>/<step>/<attempt>``; the same attempt keeps its id.
    resource: what the price book knows it by, such as ``openai/gpt-4o-mini`` or ``embedding/e5``.
    quantities: unit → count: ``input_tokens`` (cached ones included), ``cached_tokens``, ``output_tokens``
    (reasoning included), ``reasoning_tokens``, ``calls``, ``bytes``. A missing unit was not reported, which
    is not zero.
    estimated: the provider's figure was lost and this one is ours.
    hold_id: the reservation that this record closes.
    """

    tenant_id: str
    usage_id: str
    resource: str
    quantities: dict[str, Count]
    occurred_at: Timestamp
    estimated: bool = False
    run_id: UUID | None = None
    hold_id: UUID | None = None


class QuotaExhausted(Message, frozen=True, kw_only=True):
    """A tenant has nothing left to spend. balance_nanos: zero or below, for late usage still debits."""

    tenant_id: str
    currency: str
    balance_nanos: int
