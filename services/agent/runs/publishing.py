"""Turns the stored events of a run into public messages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import get_args
from uuid import UUID

from infra.postgres.event_store import Aggregate, Publication, Stream
from infra.postgres.upcasting import EventTypes
from protos.catalog import AGENT_EVENTS
from protos.envelope import Message
from protos.messages import agent as public
from services.agent.models.contract import ToolCall
from services.agent.runs import events
from services.agent.runs.domain import Run, decide, evolve


def publish(run_id: str, event: events.Event) -> Iterable[Publication]:
    """All events but `RunCompleted`: its text is stored sealed, so the code that completes the run publishes it."""
    id_ = _uuid(run_id)
    key = event.session_key
    match event:
        case events.RunStarted():
            message: Message = public.RunStarted(
                run_id=id_, session_key=key, agent_id=event.agent_id, attempt=event.attempt, n=event.n
            )
        case events.StepStarted():
            message = public.StepStarted(
                run_id=id_,
                session_key=key,
                n=event.n,
                step=event.step,
                kind=event.kind,
                name=event.name,
                attempt=event.attempt,
            )
        case events.AttemptFailed():
            message = public.StepRetried(run_id=id_, session_key=key, n=event.n, step=event.step, attempt=event.attempt)
        case events.StepCompleted():
            message = public.StepCompleted(
                run_id=id_,
                session_key=key,
                step=event.step,
                kind=event.kind,
                name=event.name,
                status=event.status,
                attempts=event.attempts,
                duration_ms=event.duration_ms,
                n=event.n,
            )
        case events.RunForked():
            message = public.RunForked(run_id=id_, session_key=key, n=event.n, origin_run_id=event.origin)
        case events.MessagesTaken():
            message = public.MessagesTaken(
                run_id=id_, session_key=key, n=event.n, step=event.step, messages=event.messages
            )
        case events.RunSuspended(reason="approval" | "agent"):
            message = public.RunWaiting(run_id=id_, session_key=key, n=event.n, step=event.step, tool=event.name)
        case events.RunSuspended():
            message = public.RunIndeterminate(
                run_id=id_, session_key=key, n=event.n, step=event.step, tool=event.name, error=event.text
            )
        case events.StepSettled():
            message = public.StepSettled(
                run_id=id_, session_key=key, n=event.n, step=event.step, decision=event.decision
            )
        case events.RunFailed():
            message = public.RunFailed(run_id=id_, session_key=key, status=event.status, error=event.error, n=event.n)
        case events.RunCompleted():
            return
    yield Publication(AGENT_EVENTS, key, message)


def publish_again(run_id: str, event: events.Event) -> Iterable[Publication]:
    """As `publish`, for events beyond the retention of the topic. Replies have expired there and are left out."""
    if isinstance(event, events.RunCompleted):
        message = public.RunCompleted(run_id=UUID(run_id), session_key=event.session_key, reply="", n=event.n)
        yield Publication(AGENT_EVENTS, event.session_key, message)
    yield from publish(run_id, event)


def published(calls: Iterable[ToolCall]) -> tuple[public.ToolCall, ...]:
    return tuple(public.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in calls)


# A run has a dozen events in a row.
_uuid = lru_cache(maxsize=1024)(UUID)

RUN = Aggregate(
    name="run",
    events=EventTypes(*get_args(events.Event)),
    initial=Run,
    evolve=evolve,
    decide=decide,
    publish=publish,
)
REPLAYED = replace(RUN, publish=publish_again)


def stream(run_id: UUID) -> Stream[Run]:
    return RUN.stream(str(run_id))
