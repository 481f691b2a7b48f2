"""The timeline of a run: message, waiting, steps, reply, delivery, usage, charge."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec

from infra.postgres.tx import Tx
from infra.security.subjects import ERASED_TEXT, SubjectKeys
from protos.billing.v1 import billing_pb2
from services.agent.models.contract import Passage, ToolCall
from services.agent.runs import queries
from services.agent.runs.content import Unsealer
from services.agent.runs.publishing import stream
from services.agent.runs.views import Timeline, TimelineItem

_WHO = {"retrieve": "memory", "model": "agent", "tool": "plugin"}
# Order of items that have the same time.
_ORDER = ("inbound", "queued", "retrieve", "model", "tool", "reply", "usage", "charge", "delivery")


async def timeline(tx: Tx, subjects: SubjectKeys, run_id: UUID, charges: billing_pb2.ChargesReply | None) -> Timeline:
    """`charges`: billing's charges of the run; None if billing did not answer. Raises NotFound."""
    run = await queries.load(tx, run_id)
    unsealer = Unsealer(tx, subjects)
    items = [
        *[item async for item in _messages(tx, unsealer, run)],
        *_queued(run),
        *[item async for item in _steps(tx, unsealer, run)],
        *_reply(run, await queries.reply(unsealer, run), await queries.calls(unsealer, run)),
        *[item async for item in _deliveries(tx, run_id)],
        *[item async for item in _usage(tx, run_id)],
        *(_charges(charges) if charges else ()),
    ]
    return Timeline(items=sorted(items, key=lambda item: (item.at, _ORDER.index(item.kind))))


async def _messages(tx: Tx, unsealer: Unsealer, run: queries.StoredRun) -> AsyncIterator[TimelineItem]:
    rows = await tx.sql(
        # A fork takes over the messages of its origin. Messages after the end of the origin belong to the fork only.
        """
        WITH RECURSIVE owner AS (SELECT $1::uuid AS id UNION ALL SELECT r.id FROM run r JOIN owner o
        ON r.forked_from = o.id WHERE r.tenant_id = $2 AND r.session_key = $3)
        SELECT message_id, subject_id, text, received_at FROM message WHERE run_id IN (SELECT id FROM owner)
        AND (run_id = $1 OR received_at <= coalesce($4, received_at)) ORDER BY seq
        """,
        run.id,
        tx.tenant_id,
        run.session_key,
        run.finished_at,
    )
    for message_id, subject_id, sealed, at in rows:
        text = await unsealer.open(sealed, subject_id, str(message_id), "text")
        yield TimelineItem(
            at=at,
            ms=None,
            kind="inbound",
            service="channel" if run.channel_id else "agent",
            summary="a message came in",
            data={"message_id": str(message_id), "text": ERASED_TEXT if text is None else text},
        )


def _queued(run: queries.StoredRun) -> Iterator[TimelineItem]:
    until = run.started_at or run.finished_at
    yield TimelineItem(
        at=run.created_at,
        ms=_ms(run.created_at, until) if until else None,
        kind="queued",
        service="agent",
        summary="the run waited for its turn" if until else "the run waits for its turn",
        data={},
    )


async def _steps(tx: Tx, unsealer: Unsealer, run: queries.StoredRun) -> AsyncIterator[TimelineItem]:
    journal = await tx.load(stream(run.id))
    rows = await tx.sql(
        """
        SELECT n, kind, name, status, attempts, started_at, duration_ms, error, span_id FROM run_step
        WHERE run_id = $1 ORDER BY n
        """,
        run.id,
    )
    for n, kind, name, status, attempts, at, ms, error, span_id in rows:
        what = {"retrieve": "knowledge looked up", "model": f"model {name}", "tool": f"tool {name}"}[kind]
        data: dict[str, Any] = {"n": n, "name": name, "status": status, "attempts": attempts}
        if kind == "retrieve" and (sealed := journal.steps[n].content):
            data["passages"] = _passages(await unsealer.open(sealed, run.subject_id, f"{run.id}/{n}", "content"))
        yield TimelineItem(
            at=at,
            ms=ms,
            kind=kind,
            service=_WHO[kind],
            summary=f"{what}: {status}",
            span_id=span_id,
            data=data | ({"error": error} if error else {}),
        )


def _passages(found: str | None) -> list[dict[str, Any]]:
    """The passages in the shape of memory's own search; none if the person was erased."""
    return [
        {
            "text": passage.text,
            "score": passage.score,
            "source": {name: getattr(passage, name) for name in ("document_id", "name", "section", "page")},
        }
        for passage in (msgspec.json.decode(found, type=tuple[Passage, ...]) if found else ())
    ]


def _reply(run: queries.StoredRun, reply: str | None, calls: Sequence[ToolCall]) -> Iterator[TimelineItem]:
    if run.finished_at is None:
        return
    data: dict[str, Any] = {"status": run.status}
    if calls:
        data["tool_calls"] = msgspec.to_builtins(calls)
    yield TimelineItem(
        at=run.finished_at,
        ms=_ms(run.created_at, run.finished_at),
        kind="reply",
        service="agent",
        summary="the run answered" if reply is not None else f"no answer, {run.status}: {run.error}",
        data=data | ({"text": reply} if reply is not None else {"error": run.error}),
    )


async def _deliveries(tx: Tx, run_id: UUID) -> AsyncIterator[TimelineItem]:
    rows = await tx.sql(
        "SELECT delivery_id, state, reason, asked_at, ended_at FROM delivery WHERE run_id = $1 ORDER BY asked_at",
        run_id,
    )
    for delivery_id, state, reason, asked_at, ended_at in rows:
        data: dict[str, Any] = {"delivery_id": str(delivery_id), "state": state}
        yield TimelineItem(
            at=ended_at or asked_at,
            ms=_ms(asked_at, ended_at) if ended_at else None,
            kind="delivery",
            service="channel",
            summary=f"reply {state}" + (f": {reason}" if reason else ""),
            data=data | ({"reason": reason} if reason else {}),
        )


async def _usage(tx: Tx, run_id: UUID) -> AsyncIterator[TimelineItem]:
    rows = await tx.sql(
        "SELECT usage_id, resource, quantities, estimated, occurred_at FROM run_usage WHERE run_id = $1", run_id
    )
    for usage_id, resource, quantities, estimated, at in rows:
        counts = msgspec.json.decode(quantities)
        yield TimelineItem(
            at=at,
            ms=None,
            kind="usage",
            service="agent",
            summary=f"{resource}: " + ", ".join(f"{count} {unit}" for unit, count in counts.items()),
            data={"usage_id": usage_id, "resource": resource, "quantities": counts, "estimated": estimated},
        )


def _charges(reply: billing_pb2.ChargesReply) -> Iterator[TimelineItem]:
    for charge in reply.charges:
        at = charge.rated_at.ToDatetime(UTC)
        amount = charge.amount_nanos if charge.HasField("amount_nanos") else None
        yield TimelineItem(
            at=at,
            ms=_ms(charge.occurred_at.ToDatetime(UTC), at),
            kind="charge",
            service="billing",
            summary=f"{charge.resource}: {charge.verdict}"
            + (f", {amount // 10**9}.{amount % 10**9:09} {reply.currency}" if amount is not None else ""),
            span_id=charge.span_id or None,
            data={
                "usage_id": charge.usage_id,
                "resource": charge.resource,
                "verdict": charge.verdict,
                "amount_nanos": amount,
                "currency": reply.currency,
            },
        )


def _ms(since: datetime, until: datetime) -> int:
    return max(0, round((until - since).total_seconds() * 1000))
