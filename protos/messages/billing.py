"""Billing: usage that all services report, budgets, and exhausted quotas. Money is integer nano-units (10⁻⁹)."""

from __future__ import annotations

from uuid import UUID

from protos.envelope import Message
from protos.messages import Count, Timestamp


class UsageRecorded(Message, frozen=True, kw_only=True):
    """Something with a price was used; a failed attempt is usage too. One usage_id debits at most once."""

    tenant_id: str
    """The tenant that pays. In the body, because usage is rated in batches."""
    usage_id: str
    """Contains the attempt, such as ``<run id>/<step>/<attempt>``; the same attempt keeps its id."""
    resource: str
    """The name in the price book, such as ``openai/gpt-4o-mini`` or ``embedding/e5``. ``learning/<model>``: the model
    found facts about a person. ``rerank/<model>``: it ordered passages."""
    quantities: dict[str, Count]
    """Unit → count: ``input_tokens`` (cached ones included), ``cached_tokens``, ``output_tokens`` (reasoning included),
    ``reasoning_tokens``, ``calls``, ``bytes``, ``messages``, ``documents``, ``storage_byte_hours``, ``run_seconds``.
    A missing unit was not reported, which is not the same as zero."""
    occurred_at: Timestamp
    estimated: bool = False
    """True if the provider's figure was lost and these counts are our estimate."""
    run_id: UUID | None = None
    hold_id: UUID | None = None
    """The reservation that this record closes."""
    agent_id: UUID | None = None
    """The agent that used it. This and the next three are the groups of reports, and the scopes of budgets."""
    channel_id: UUID | None = None
    """The channel whose message led to the use."""
    session_key: str | None = None
    api_key_id: str | None = None
    """The API key whose request led to the use."""
    member_id: UUID | None = None
    """The member of the tenant whose request led to the use. This and the tag are groups of reports."""
    tag: str | None = None
    """A name for usage that belongs together, such as a cost centre; at most 100 printable characters."""


class QuotaExhausted(Message, frozen=True, kw_only=True):
    """A tenant has spent all of its credit."""

    tenant_id: str
    currency: str
    balance_nanos: int
    """Zero or below, because late usage still debits."""


class BudgetThresholdPassed(Message, frozen=True, kw_only=True):
    """The spending of a budget has passed one of its thresholds. Once for each threshold and period."""

    tenant_id: str
    budget_id: UUID
    scope: str
    """``tenant``, ``agent``, ``channel``, ``session`` or ``key``."""
    scope_id: str
    """Empty for the tenant."""
    period: str
    """``day``, ``month`` or ``total``."""
    percent: int
    """100: the budget is spent, and work that it concerns is refused."""
    nanos: int
    """The limit."""
    spent_nanos: int
    """In the period."""
