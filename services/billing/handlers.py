"""Handlers of the messages that billing receives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from uuid import UUID

import msgspec
from opentelemetry import trace

from infra.errors import InvalidMessage
from infra.observe.metrics import Metrics
from infra.postgres.tx import Tx
from infra.stores.cache import Cache
from protos.catalog import CHANNEL_EVENTS, PLATFORM_EVENTS, USAGE_RECORDS
from protos.envelope import Message
from protos.messages.billing import BudgetThresholdPassed, QuotaExhausted, UsageRecorded
from protos.messages.channel import MessageDelivered, MessageReceived
from protos.messages.user import TenantCreated
from protos.pubsub import QUOTA_EXHAUSTED
from services.billing.credit import accounts
from services.billing.rating.domain import MESSAGE, NO_ACCOUNT, OTHER_CONTENT, Verdict
from services.billing.usage import deliveries
from services.billing.usage import records as usage


@USAGE_RECORDS.batch(group="billing")
async def count_usage(records: list[UsageRecorded], tx: Tx, metrics: Metrics) -> None:
    """Commits verdict, debit, ledger entry and the end of the hold in one transaction with the offset."""
    verdicts = await usage.rate(tx, records)
    if trace.get_current_span().is_recording():
        span_ids = [_follow(record, verdict, tx) for record, verdict in zip(records, verdicts, strict=True)]
    else:
        span_ids = [""] * len(records)
    await _record(tx, records, verdicts, span_ids, metrics)


async def _record(
    tx: Tx, records: Sequence[UsageRecorded], verdicts: Sequence[Verdict], span_ids: Sequence[str], metrics: Metrics
) -> None:
    costs = await usage.record(tx, records, verdicts, span_ids)

    async def show() -> None:
        kinds = ("conflict" if verdict.reason == OTHER_CONTENT else verdict.kind for verdict in verdicts)
        for kind, count in Counter(kinds).items():
            metrics.usage_records.labels(kind).inc(count)
        for currency, nanos in costs:
            metrics.cost_nanos.labels(currency).inc(nanos)

    tx.after_commit(show)


def _follow(record: UsageRecorded, verdict: Verdict, tx: Tx) -> str:
    """Records a span in the trace of the run or call that used it. Returns the span's id, empty if not recorded."""
    with tx.follow(record, "charge") as span:
        if not span.is_recording():
            return ""
        span.set_attribute("claw.usage.id", record.usage_id)
        span.set_attribute("claw.usage.resource", record.resource)
        span.set_attribute("claw.charge.verdict", verdict.kind)
        if verdict.amount_nanos is not None:
            span.set_attribute("claw.charge.amount_nanos", verdict.amount_nanos)
        return f"{span.get_span_context().span_id:016x}"


@PLATFORM_EVENTS.batch(group="billing")
async def open_accounts(events: list[Message], tx: Tx) -> None:
    """Opens the accounts of new tenants, and rates the usage that arrived before them."""
    created = {event.tenant_id: event for event in reversed(events) if isinstance(event, TenantCreated)}
    # Accounts are locked in the order of their key. A batch of usage with the same tenants would otherwise deadlock.
    for tenant_id, event in sorted(created.items()):
        if await accounts.open_account(tx, tenant_id, event.currency, event.credit_nanos):
            await usage.rate_again(tx, await usage.held(tx, tenant_id, reason=NO_ACCOUNT))


@PLATFORM_EVENTS.each(QuotaExhausted, group="billing")
async def on_quota_exhausted(event: QuotaExhausted, tx: Tx, cache: Cache) -> None:
    _tell_processes(event, tx, cache)


@PLATFORM_EVENTS.each(BudgetThresholdPassed, group="billing")
async def on_budget_threshold_passed(event: BudgetThresholdPassed, tx: Tx, cache: Cache) -> None:
    if event.percent == 100:
        _tell_processes(event, tx, cache)


def _tell_processes(event: QuotaExhausted | BudgetThresholdPassed, tx: Tx, cache: Cache) -> None:
    """A hint for processes that listen: only billing's database decides whether work is refused."""

    async def publish() -> None:
        await cache.publish(QUOTA_EXHAUSTED, msgspec.json.encode(event))

    tx.after_commit(publish)


@CHANNEL_EVENTS.batch(group="billing")
async def count_messages(events: list[Message], tx: Tx, metrics: Metrics) -> None:
    """Counts delivered messages."""
    delivered: list[tuple[str, date, UUID]] = []
    used: list[UsageRecorded] = []
    for event in events:
        headers = tx.origins[id(event)]
        if (tenant_id := headers.get("tenant_id")) and isinstance(event, MessageDelivered):
            at = _time(headers)
            delivered.append((tenant_id, at.astimezone(UTC).date(), event.channel_id))
            used.append(record := _message_used(event, tenant_id, at))
            tx.origins[id(record)] = headers
    if used:
        await _record(tx, used, await usage.rate(tx, used), [""] * len(used), metrics)
    await deliveries.count(tx, delivered)


@CHANNEL_EVENTS.batch(group="billing", projection=("channel",))
async def note_channel_types(events: list[Message], tx: Tx) -> None:
    """Stores the types of channels, which MessageDelivered does not carry."""
    received = []
    for event in events:
        tenant_id = tx.origins[id(event)].get("tenant_id")
        if tenant_id and isinstance(event, MessageReceived):
            received.append((event.channel_id, tenant_id, event.channel_type))
    await deliveries.store_channel_types(tx, received)


def _message_used(event: MessageDelivered, tenant_id: str, at: datetime) -> UsageRecorded:
    return UsageRecorded(
        tenant_id=tenant_id,
        usage_id=f"message/{event.delivery_id}",
        resource=MESSAGE,
        quantities={"messages": 1},
        occurred_at=at,
        run_id=event.run_id,
        agent_id=event.sender.agent_id,
        channel_id=event.channel_id,
        session_key=event.session_key,
        api_key_id=event.sender.api_key_id or None,
        member_id=event.sender.member_id,
        tag=event.sender.tag or None,
    )


def _time(headers: Mapping[str, str]) -> datetime:
    try:
        return datetime.fromisoformat(headers["ce_time"])
    except (KeyError, ValueError):
        raise InvalidMessage("header ce_time", "must be an RFC 3339 time") from None
