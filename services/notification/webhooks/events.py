"""The events that an endpoint can ask for, and their content. None of them holds personal content."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

from protos.envelope import Message
from protos.messages.agent import RunCompleted, RunFailed, RunIndeterminate, RunStarted, RunWaiting
from protos.messages.billing import BudgetThresholdPassed, QuotaExhausted
from protos.messages.channel import AccountBroken, MessageDelivered, MessageReceived, MessageUndelivered

EventType = Literal[
    "run.started",
    "run.waiting",
    "run.indeterminate",
    "run.completed",
    "run.failed",
    "run.cancelled",
    "run.refused",
    "message.received",
    "message.delivered",
    "message.failed",
    "channel.broken",
    "quota.exhausted",
    "budget.threshold",
]
EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)


class WebhookEvent(NamedTuple):
    type: EventType
    data: dict[str, Any]


def event_of(message: Message) -> WebhookEvent | None:
    """The event that endpoints get for a public message; None if they get none."""
    match message:
        case RunStarted(attempt=1):
            return _event("run.started", message, "run_id", "session_key", "agent_id")
        case RunWaiting():
            return _event("run.waiting", message, "run_id", "session_key", "step", "tool")
        case RunIndeterminate():
            return _event("run.indeterminate", message, "run_id", "session_key", "step", "tool", "error")
        case RunCompleted():
            return _event("run.completed", message, "run_id", "session_key", "finish_reason")
        case RunFailed(status="cancelled"):
            return _event("run.cancelled", message, "run_id", "session_key", "error")
        case RunFailed(status="refused"):
            return _event("run.refused", message, "run_id", "session_key", "error")
        case RunFailed():
            return _event("run.failed", message, "run_id", "session_key", "error")
        case MessageReceived():
            return _event("message.received", message, "channel_id", "channel_type", "agent_id", "session_key")
        case MessageDelivered():
            return _event("message.delivered", message, "delivery_id", "channel_id", "session_key", "run_id")
        case MessageUndelivered():
            fields = "delivery_id", "channel_id", "session_key", "run_id", "outcome", "reason"
            return _event("message.failed", message, *fields)
        case AccountBroken():
            return _event("channel.broken", message, "channel_id", "channel_type", "reason")
        case QuotaExhausted():
            return _event("quota.exhausted", message, "currency", "balance_nanos")
        case BudgetThresholdPassed():
            budget = "budget_id", "scope", "scope_id", "period", "percent", "nanos", "spent_nanos"
            return _event("budget.threshold", message, *budget)
    return None


def _event(type_: EventType, message: Message, *fields: str) -> WebhookEvent:
    return WebhookEvent(type_, {field: getattr(message, field) for field in fields})
