"""Handlers of the messages that billing receives."""

from __future__ import annotations

from uuid import UUID

from opentelemetry import trace

from infra.postgres.tx import Tx
from protos.catalog import CHANNEL_EVENTS, PLATFORM_EVENTS, USAGE_RECORDS
from protos.messages.billing import UsageRecorded
from protos.messages.channel import MessageDelivered, MessageReceived
from protos.messages.user import TenantCreated
from services.billing import accounts, deliveries, usage
from services.billing.domain import NO_ACCOUNT, Verdict
from services.billing.usage import Judged


@USAGE_RECORDS.batch(group="billing")
async def count_usage(records: list[UsageRecorded], tx: Tx) -> None:
    """Commits verdict, debit, ledger entry and the end of the hold in one transaction with the offset."""
    verdicts = await usage.verdicts(tx, records)
    await usage.record(tx, [_judged(record, verdict, tx) for record, verdict in zip(records, verdicts, strict=True)])


def _judged(record: UsageRecorded, verdict: Verdict, tx: Tx) -> Judged:
    return Judged(record, verdict, UUID(tx.origins[id(record)]["ce_id"]), _follow(record, verdict, tx))


def _follow(record: UsageRecorded, verdict: Verdict, tx: Tx) -> str:
    """Records a span in the trace of the run or call that used it. Returns the span's id, empty if not recorded."""
    if not trace.get_current_span().is_recording():
        return ""
    with tx.follow(record, "charge") as span:
        if not span.is_recording():
            return ""
        span.set_attribute("claw.usage.id", record.usage_id)
        span.set_attribute("claw.usage.resource", record.resource)
        span.set_attribute("claw.charge.verdict", verdict.kind)
        if verdict.amount_nanos is not None:
            span.set_attribute("claw.charge.amount_nanos", verdict.amount_nanos)
        return f"{span.get_span_context().span_id:016x}"


@PLATFORM_EVENTS.each(TenantCreated, group="billing")
async def open_account(event: TenantCreated, tx: Tx) -> None:
    if await accounts.open_account(tx, event.tenant_id, event.currency, event.credit_nanos):
        # Usage that arrived before its tenant was held, because the currency of the account was not known.
        await usage.rate_again(tx, await usage.held(tx, event.tenant_id, reason=NO_ACCOUNT))


@CHANNEL_EVENTS.each(MessageReceived, group="billing")
async def learn_channel_type(event: MessageReceived, tx: Tx) -> None:
    """Stores the channel's type, which MessageDelivered does not carry."""
    if tx.tenant_id:
        await deliveries.learn(tx, tx.tenant_id, event.channel_id, event.channel_type)


@CHANNEL_EVENTS.each(MessageDelivered, group="billing")
async def count_delivery(event: MessageDelivered, tx: Tx) -> None:
    if tx.tenant_id and tx.cause:
        await deliveries.count(tx, tx.tenant_id, event.channel_id, tx.cause.time)
