"""Queries for one run, for lists of runs, and for the public events of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import msgspec

from infra.errors import InvalidMessage, NotFound
from infra.postgres.tx import Tx
from infra.security.subjects import ERASED_TEXT, SubjectKeys
from infra.service.api import of_one_page
from protos.billing.v1 import billing_pb2
from protos.messages import agent as public
from services.agent.models.contract import ToolCall
from services.agent.runs.content import Unsealer
from services.agent.runs.events import RunCompleted
from services.agent.runs.family import child_id
from services.agent.runs.projections import STOPPABLE, SUSPENDED
from services.agent.runs.publishing import RUN, publish, published, stream
from services.agent.runs.views import Fact, FinishReason, RunView, Status, StepView, ToolCallView, UsageView, Waiting


@dataclass(frozen=True)
class StoredRun:
    """A run's row."""

    id: UUID
    session_key: str
    agent_id: UUID
    subject_id: str
    channel_id: UUID | None
    status: Status
    reply: bytes | None
    """Sealed."""
    calls: bytes | None
    """Sealed."""
    error: str | None
    trace_id: str | None
    input_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    parent_run_id: UUID | None
    forked_from: UUID | None
    finish_reason: FinishReason | None
    used: int
    """How many usage records the run has."""


_COLUMNS = (
    "id, session_key, agent_id, subject_id, channel_id, status, reply, calls, error, trace_id, input_tokens, "
    "cached_tokens, output_tokens, created_at, started_at, finished_at, parent_run_id, forked_from, "
    "(SELECT CASE WHEN (data ->> 'filtered')::boolean THEN 'content_filter' "
    "ELSE coalesce(data ->> 'finish_reason', 'stop') END FROM (SELECT convert_from(data, 'UTF8')::jsonb AS data "
    "FROM event WHERE stream_id = 'run:' || run.id AND type = 'RunCompleted' LIMIT 1) AS completed), "
    "(SELECT count(*) FROM run_usage u WHERE u.run_id = run.id) FROM run"
)


async def load(tx: Tx, run_id: UUID) -> StoredRun:
    """Raises NotFound, also for another tenant's run."""
    rows = await tx.sql(f"SELECT {_COLUMNS} WHERE id = $1 AND tenant_id = $2", run_id, tx.tenant_id)
    if not rows:
        raise NotFound(f"run {run_id}")
    return StoredRun(*rows[0])


async def reply(unsealer: Unsealer, run: StoredRun) -> str | None:
    """The reply in plain; None if there is none."""
    if run.reply is None:
        return None
    found = await unsealer.open(run.reply, run.subject_id, str(run.id), "reply")
    return ERASED_TEXT if found is None else found


async def calls(unsealer: Unsealer, run: StoredRun) -> tuple[ToolCall, ...]:
    """The calls of the caller's tools in plain; none if the person was erased."""
    found = await unsealer.open(run.calls, run.subject_id, str(run.id), "calls") if run.calls else None
    return msgspec.json.decode(found, type=tuple[ToolCall, ...]) if found else ()


async def waiting(tx: Tx, unsealer: Unsealer, run: StoredRun) -> Waiting | None:
    """The decision that the run waits for; None if it waits for none, or was decided since its row was read."""
    waits = (await tx.load(stream(run.id))).suspended if run.status in SUSPENDED else None
    if waits is None:
        return None
    arguments = None
    if waits.arguments:
        arguments = await unsealer.open(waits.arguments, run.subject_id, f"{run.id}/{waits.step}", "arguments")
    asked = child_id(run.id, waits.step) if waits.reason == "agent" else None
    return Waiting(
        reason=waits.reason, step=waits.step, tool=waits.name, arguments=arguments, run_id=asked, since=waits.at
    )


async def steps(tx: Tx, runs: Sequence[StoredRun]) -> dict[UUID, list[StepView]]:
    """The steps of each run, the first one first."""
    rows = await tx.sql(
        """
        SELECT run_id, n, kind, name, status, attempts, duration_ms, error FROM run_step
        WHERE run_id = ANY($1::uuid[]) ORDER BY run_id, n
        """,
        [run.id for run in runs],
    )
    found: dict[UUID, list[StepView]] = {run.id: [] for run in runs}
    for run_id, *row in rows:
        found[run_id].append(StepView(**dict(zip(StepView.model_fields, row, strict=True))))
    return found


async def listed(
    tx: Tx, *, session_key: str | None, agent_id: UUID | None, status: Status | None, after: str | None, limit: int
) -> tuple[Sequence[StoredRun], bool]:
    """At most `limit` of the tenant's runs that match, the newest first, and whether others follow. Their answers fit
    on one page."""
    created_at, id_ = _position(after) if after else (None, None)
    sizes = await tx.sql(
        """
        SELECT id, coalesce(octet_length(reply), 0) + coalesce(octet_length(calls), 0) FROM run
        WHERE tenant_id = $1 AND ($2::text IS NULL OR session_key = $2)
        AND ($3::uuid IS NULL OR agent_id = $3) AND ($4::text IS NULL OR status = $4)
        AND ($5::timestamptz IS NULL OR (created_at, id) < ($5, $6::uuid)) ORDER BY created_at DESC, id DESC LIMIT $7
        """,
        tx.tenant_id,
        session_key,
        agent_id,
        status,
        created_at,
        id_,
        limit + 1,
    )
    ids: list[UUID] = of_one_page(sizes[:limit])
    rows = await tx.sql(f"SELECT {_COLUMNS} WHERE id = ANY($1::uuid[]) ORDER BY created_at DESC, id DESC", ids)
    return [StoredRun(*row) for row in rows], len(sizes) > len(ids)


def position(run: RunView) -> str:
    """The cursor of a page that ends with this run."""
    return f"{run.created_at.isoformat()}|{run.id}"


class Costs(NamedTuple):
    """The costs of runs that billing knows."""

    by_run: Mapping[str, billing_pb2.RunCost]
    """By the run's id. A run without usage is missing."""
    currency: str | None


def view(
    run: StoredRun,
    reply: str | None,
    calls: Iterable[ToolCall],
    steps: list[StepView],
    costs: Costs | None,
    waiting: Waiting | None,
) -> RunView:
    """`costs`: None if billing did not answer."""
    cost = costs.by_run.get(str(run.id), billing_pb2.RunCost()) if costs else None
    # Usage that is held for review or still on its way has no price yet, so the cost is not known.
    if cost and (cost.records != run.used or run.status in STOPPABLE):
        cost = None
    return RunView(
        id=run.id,
        session_key=run.session_key,
        agent_id=run.agent_id,
        status=run.status,
        reply=reply,
        finish_reason=run.finish_reason,
        tool_calls=[ToolCallView(id=call.id, name=call.name, arguments=call.arguments) for call in calls],
        error=run.error,
        trace_id=run.trace_id,
        usage=UsageView(
            input_tokens=run.input_tokens, cached_tokens=run.cached_tokens, output_tokens=run.output_tokens
        ),
        cost_nanos=cost.amount_nanos if cost else None,
        currency=costs.currency if costs else None,
        steps=steps,
        waiting=waiting,
        parent_run_id=run.parent_run_id,
        forked_from=run.forked_from,
        created_at=run.created_at,
        started_at=run.started_at,
        finished_at=run.finished_at,
    )


def _position(text: str) -> tuple[datetime, UUID]:
    created_at, _, id_ = text.partition("|")
    try:
        return datetime.fromisoformat(created_at), UUID(id_)
    except ValueError:
        raise InvalidMessage("cursor", "is not a valid cursor") from None


async def facts(tx: Tx, subjects: SubjectKeys, run_id: UUID, after: int) -> list[Fact]:
    """The run's public events with an `n` above `after`. Raises NotFound."""
    await load(tx, run_id)
    rows = await tx.sql(
        "SELECT type, schema_version, data, recorded_at FROM event WHERE stream_id = $1 ORDER BY version",
        stream(run_id).row,
    )
    found = []
    for name, version, data, at in rows:
        event = RUN.events.decode(name, version, data)
        if event.n <= after:
            continue
        if isinstance(event, RunCompleted):
            # After the events: a row that was read before the run has ended has no reply.
            run = await load(tx, run_id)
            unsealer = Unsealer(tx, subjects)
            message: Any = public.RunCompleted(
                run_id=run_id,
                session_key=event.session_key,
                reply=await reply(unsealer, run) or "",
                n=event.n,
                tool_calls=published(await calls(unsealer, run)),
                finish_reason=event.finish_reason,
                filtered=event.filtered,
                subject_id=run.subject_id,
                channel_id=run.channel_id,
            )
        else:
            [(_, _, message)] = publish(str(run_id), event)
        found.append(Fact(n=event.n, type=message.wire_name(), time=at, data=msgspec.to_builtins(message)))
    return found
