"""Steps of a run, each made once: taken from the journal if it ended there, otherwise made and recorded.

A step's start is committed before its call. Its end is committed right after the call, with the usage.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

import grpc.aio
import msgspec
from opentelemetry import trace

from infra import VERSION
from infra.clock import utcnow
from infra.errors import EffectFailed, InvalidMessage, NotFound, RetryLater, TooLarge, Transient
from infra.failpoint import failpoint
from infra.lanes.effects import Effects
from infra.lanes.group import ForbiddenByGuard, Group
from infra.observe.redaction import redacted
from infra.postgres.db import storable
from infra.postgres.tx import Tx
from protos.catalog import USAGE_RECORDS
from protos.messages.billing import UsageRecorded
from services.agent.execution.context import RunContext
from services.agent.execution.outcome import Ended, Suspended
from services.agent.execution.watch import CancelRequested, Watch
from services.agent.models.contract import ModelFailed, Usage
from services.agent.runs import projections
from services.agent.runs.content import ToolResult
from services.agent.runs.domain import (
    BeginStep,
    Command,
    EndStep,
    FailAttempt,
    Step,
    Suspend,
    TakeMessages,
    check,
    decide,
    evolve,
    exceeded,
    remaining,
)
from services.agent.runs.events import StepKind
from services.agent.runs.notices import CANCELLED, FAILED, approval_question
from services.agent.runs.publishing import stream

T = TypeVar("T")

# Pauses between the attempts of a step, if the called service names none.
PAUSES = (timedelta(seconds=1), timedelta(seconds=2), timedelta(seconds=5), timedelta(seconds=10))


class StepFailed(Exception):
    """The step has failed for good, and the journal says so. The text is for the operator."""


class Metered(msgspec.Struct, frozen=True):
    """The usage of a step."""

    resource: str
    usage: Usage
    hold_id: UUID | None
    """The hold that the usage record closes; None: the hold stays for another attempt."""
    nanos: int = 0
    """The amount of the hold."""


class _Result(NamedTuple):
    """The result of a step's call."""

    content: bytes
    """Sealed."""
    metered: Metered | None


@dataclass(frozen=True)
class StepSpec:
    """A step to be made."""

    kind: StepKind
    name: str
    digest: str
    """Of the step's input."""
    attempts: int | None = None
    """How often a call with transient errors is made; None: as long as the run has time."""
    max_pause: timedelta = timedelta.max
    """If the next attempt would have to wait longer than this, the step fails instead."""
    lost: Callable[[bool], Metered | None] = lambda in_other_process: None
    """Estimates the usage of an attempt without a result. The argument: another process made the attempt."""


Call = Callable[[str, int], Coroutine[Any, Any, tuple[T, Metered | None]]]
"""Takes the idempotency key and the attempt, returns the content and its usage."""


class Steps:
    """Makes the steps of one run in order and records them in its journal.

    A process that dies during a call leaves a started step behind. The next worker makes that step again: its effect
    may happen twice, or the called service knows its idempotency key.
    """

    def __init__(self, context: RunContext, effects: Effects, group: Group, watch: Watch) -> None:
        self._context = context
        self._effects = effects
        self._group = group
        self._watch = watch
        # Steps that are made at the same time write one after the other: each write continues the version before.
        self._turn = asyncio.Lock()

    def next_has_begun(self) -> bool:
        """True if the journal has the next step, ended or not."""
        return self._next() is not None

    def next_has_ended(self) -> bool:
        """True if the journal has the next step with its end."""
        known = self._next()
        return known is not None and known.status != "started"

    def next_digest(self) -> str | None:
        """The digest of the next step in the journal; None if it has none."""
        known = self._next()
        return known.digest if known else None

    def _next(self) -> Step | None:
        return self._context.state.steps.get(self._context.last_step + 1)

    async def make(self, spec: StepSpec, call: Call[T], type_: type[T]) -> T:
        """The content of the next step. Steps at the same time are numbered in the order of these calls.

        Raises StepFailed; Ended if a limit or a cancellation forbids the step; Transient if it is to be tried again;
        Mismatch if the journal has another step at this place.
        """
        n, known = self._enter(spec)
        content = known.content if known else await self._make(n, spec, call)
        if content is None:
            assert known
            raise StepFailed(known.error or "")
        return msgspec.json.decode(self._open(n, content), type=type_)

    async def begin_for_child(self, spec: StepSpec) -> ToolResult | None:
        """Begins the next step, which another run answers. Returns its result; None if there is none yet.

        Raises StepFailed, Ended, Mismatch.
        """
        is_new = not self.next_has_begun()
        n, known = self._enter(spec)
        if known is None:
            if is_new:
                await self._begin(n, spec, 1)
            return None
        if known.content is None:
            raise StepFailed(known.error or "")
        return msgspec.json.decode(self._open(n, known.content), type=ToolResult)

    async def end_for_child(self, n: int, result: str | None, error: str | None) -> None:
        """Records the answer of the other run as the end of step `n`. `result` is None if that run failed."""
        made = None
        if result is not None:
            content = msgspec.json.encode(ToolResult(result)).decode()
            made = _Result(self._context.key.seal(content, *self._sealing(n)), None)
        await self._end(n, 1, 0, made, error)

    async def refuse(self, spec: StepSpec, reason: str) -> None:
        """Records that the next step is not made."""
        context = self._context
        has_ended = self.next_has_ended()
        context.last_step += 1
        n, key = context.last_step, context.session_key
        if has_ended:
            check(context.state, n, spec.kind, spec.name, spec.digest, VERSION)
            return
        await self._write(
            lambda tx: projections.step_not_made(tx, context.run_id, n, spec.kind, spec.name, "failed", 1, reason),
            BeginStep(key, n, spec.kind, spec.name, 1, spec.digest, VERSION),
            EndStep(key, n, 1, 0, None, reason),
        )

    async def record_messages(self, count: int) -> None:
        """From the next step on the run answers its first `count` messages."""
        context = self._context
        await self._write(lambda tx: None, TakeMessages(context.session_key, context.last_step + 1, count))

    def decision_on_next(self, offset: int) -> str | None:
        """The decision of a person about the step that comes `offset` steps after the last one."""
        return self._context.state.decisions.get(self._context.last_step + offset)

    def ask_for_approval(self, offset: int, tool: str, arguments: str) -> Suspended:
        """The run has to wait until a person has decided about that step."""
        context, n = self._context, self._context.last_step + offset
        sealed = context.key.seal(
            arguments, context.tenant_id, context.subject_id, f"{context.run_id}/{n}", "arguments"
        )
        text = f"step {n}, tool {tool}: waits for approval"
        command = Suspend(context.session_key, "approval", n, tool, text, utcnow(), sealed)
        return Suspended(command, approval_question(tool, arguments))

    def _enter(self, spec: StepSpec) -> tuple[int, Step | None]:
        """Goes on to the next step: its number, and the step if the journal has its end. Raises Ended, Mismatch."""
        context = self._context
        has_begun, has_ended = self.next_has_begun(), self.next_has_ended()
        context.last_step += 1
        n = context.last_step
        if has_ended:
            check(context.state, n, spec.kind, spec.name, spec.digest, VERSION)
            return n, context.state.steps[n]
        if not has_begun and (reason := exceeded(context.state, context.limits, n, utcnow())):
            raise Ended("failed", reason, FAILED)
        return n, None

    async def _make(self, n: int, spec: StepSpec, call: Call[T]) -> bytes:
        """The step's content, sealed. Raises StepFailed, Ended, RetryLater, and the other errors of the call."""
        context = self._context
        known = context.state.steps.get(n)
        attempt = known.attempt + 1 if known else 1
        # The process of the attempt before is gone, so it is not known how that attempt ended.
        lost = spec.lost(True) if known and not known.failed_attempt else None
        await self._begin(n, spec, attempt, lost)
        failpoint("after_effect_started")
        self._effects.lease.check()
        began = time.monotonic()
        # A step that a person wants made again is a new call, with a new key.
        retries = known.settled if known else 0
        key = self._effects.idempotency_key(f"{context.run_id}/{n}" + (f"/{retries}" if retries else ""))
        made: _Result | None = None
        error: str | None = None
        cancelled = False
        try:
            value, metered = await self._try(spec, attempt, call(key, attempt))
            made = _Result(context.key.seal(msgspec.json.encode(value).decode(), *self._sealing(n)), metered)
        except EffectFailed as failure:
            error = failure.reason
        except CancelRequested:
            error, cancelled = CANCELLED, True
        except RetryLater as later:
            await self._attempt_failed(n, attempt, str(later), spec.lost(False))
            raise
        failpoint("after_effect_call")
        ms = round((time.monotonic() - began) * 1000)
        await self._end(n, attempt, ms, made, error, spec.lost(False) if made is None else None)
        failpoint("after_effect_commit")
        if cancelled:
            raise Ended("cancelled", CANCELLED)
        if made is None:
            raise StepFailed(error or "")
        return made.content

    async def _begin(self, n: int, spec: StepSpec, attempt: int, lost: Metered | None = None) -> None:
        """`lost` is the estimated usage of the attempt before."""
        context, span_id = self._context, _span_id()

        def also(tx: Tx) -> None:
            projections.step_started(tx, context.run_id, n, spec.kind, spec.name, attempt, span_id)
            if lost:
                self._used(tx, n, attempt - 1, lost, estimated=True)

        command = BeginStep(context.session_key, n, spec.kind, spec.name, attempt, spec.digest, VERSION)
        try:
            await self._write(also, command, may_be_forbidden=True)
        except ForbiddenByGuard:
            raise Ended("cancelled", CANCELLED) from None

    async def _attempt_failed(self, n: int, attempt: int, error: str, lost: Metered | None) -> None:
        def also(tx: Tx) -> None:
            if lost:
                self._used(tx, n, attempt, lost, estimated=True)

        await self._write(also, FailAttempt(self._context.session_key, n, attempt, redacted(error)))

    async def _end(
        self, n: int, attempt: int, ms: int, made: _Result | None, error: str | None, lost: Metered | None = None
    ) -> None:
        context = self._context
        metered = made.metered if made else None
        usage = metered.usage if metered else Usage()
        tokens = (usage.input_tokens or 0) + (usage.output_tokens or 0)
        error = None if error is None else storable(redacted(error), 4000)

        def also(tx: Tx) -> None:
            projections.step_ended(tx, context.run_id, n, "completed" if made else "failed", ms, error)
            if metered:
                self._used(tx, n, attempt, metered)
            elif lost:
                self._used(tx, n, attempt, lost, estimated=True)

        content, nanos = made.content if made else None, metered.nanos if metered else 0
        await self._write(also, EndStep(context.session_key, n, attempt, ms, content, error, tokens, nanos))

    async def _write(self, also: Callable[[Tx], None], *commands: Command, may_be_forbidden: bool = False) -> None:
        """Commits the events of the commands and the rows that `also` adds, together with other runs' writes."""
        context = self._context
        async with self._turn:
            state = context.state
            tx = self._group.buffered(context.tenant_id)
            for command in commands:
                events = decide(command, state)
                # The stream's version is the number of its events: no other worker writes while this one has the run.
                tx.append_at(stream(context.run_id), events, context.state.n)
                for event in events:
                    state = evolve(state, event)
            also(tx)
            await self._group.write(self._effects.lease, tx, context.run_id, may_be_forbidden=may_be_forbidden)
            context.state = state

    async def _try(self, spec: StepSpec, attempt: int, call: Coroutine[Any, Any, T]) -> T:
        context = self._context
        seconds = remaining(context.state, context.limits, utcnow())
        after: timedelta | None = None
        try:
            return await self._watch.guard(context.run_id, call, seconds)
        except TimeoutError:
            raise EffectFailed(f"the limit of {context.limits.seconds} seconds is reached") from None
        except (InvalidMessage, NotFound, TooLarge) as error:
            raise EffectFailed(str(error)) from error
        except ModelFailed as error:
            if not error.passing:
                raise EffectFailed(error.reason) from error
            after, reason = error.after, error.reason
        except (Transient, grpc.aio.AioRpcError) as error:
            after, reason = (error.after if isinstance(error, RetryLater) else None), str(error)
        # Not all runs at the same moment: a service that was too busy for them would be too busy again.
        pause = after if after is not None else PAUSES[min(attempt, len(PAUSES)) - 1] * random.uniform(0.5, 1.0)
        if pause > spec.max_pause:
            raise EffectFailed(f"{reason} (the next attempt would have to wait {pause.total_seconds():.0f} s)")
        if spec.attempts is not None and attempt >= spec.attempts:
            raise EffectFailed(f"{reason} (after {attempt} attempts)")
        if pause.total_seconds() >= seconds:
            raise EffectFailed(f"{reason} (the run has no time left for another attempt)")
        raise RetryLater(pause, reason)

    def _used(self, tx: Tx, n: int, attempt: int, metered: Metered, *, estimated: bool = False) -> None:
        record = _usage_record(self._context, n, attempt, metered, estimated)
        tx.publish(USAGE_RECORDS, record, key=self._context.tenant_id)
        projections.used(tx, record, metered.usage)

    def _sealing(self, n: int) -> tuple[str, ...]:
        return self._context.tenant_id, self._context.subject_id, f"{self._context.run_id}/{n}", "content"

    def _open(self, n: int, content: bytes) -> str:
        return self._context.key.open(content, *self._sealing(n))


def digest(*parts: object) -> str:
    """A short hash of a step's input, which shows whether the input is still the same."""
    return hashlib.blake2b(msgspec.json.encode(parts), digest_size=8).hexdigest()


def _usage_record(context: RunContext, n: int, attempt: int, metered: Metered, estimated: bool) -> UsageRecorded:
    usage = msgspec.structs.asdict(metered.usage)
    return UsageRecorded(
        tenant_id=context.tenant_id,
        usage_id=usage_id(context.run_id, n, attempt),
        resource=metered.resource,
        # A call without reported usage still counts as a call, for a person to review. Figures are not invented here.
        quantities={unit: count for unit, count in usage.items() if count is not None} or {"calls": 1},
        occurred_at=utcnow(),
        estimated=estimated,
        run_id=context.run_id,
        hold_id=metered.hold_id,
    )


def usage_id(run_id: UUID, n: int, attempt: int) -> str:
    return f"{run_id}/{n}/{attempt}"


def _span_id() -> str | None:
    context = trace.get_current_span().get_span_context()
    return f"{context.span_id:016x}" if context.is_valid else None
