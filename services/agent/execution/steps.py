"""Steps of a run, each made once: taken from the journal if it ended there, otherwise made and recorded.

A step's start is committed before its call. Its end is committed right after the call, with the usage.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

import grpc.aio
import msgspec

from infra import VERSION
from infra.clock import utcnow
from infra.errors import EffectFailed, InvalidMessage, NotFound, RetryLater, TooLarge, Transient
from infra.failpoint import failpoint
from infra.lanes.effects import Effects
from infra.observe.redaction import redacted
from infra.observe.spans import current_ids
from infra.postgres.db import storable
from services.agent.execution.context import RunContext
from services.agent.execution.group_write import MessagesArrived, RunStopped
from services.agent.execution.journal import RunJournal
from services.agent.execution.outcome import Ended, Suspended
from services.agent.execution.usage import MeteredCall
from services.agent.execution.watch import CancelRequested, Watch
from services.agent.models.contract import ModelFailed, Usage
from services.agent.runs.content import ToolResult
from services.agent.runs.domain import (
    BeginStep,
    EndStep,
    FailAttempt,
    Step,
    Suspend,
    TakeMessages,
    check,
)
from services.agent.runs.events import StepKind
from services.agent.runs.limits import exceeded, remaining
from services.agent.runs.notices import CANCELLED, FAILED, approval_question

T = TypeVar("T")

# Pauses between the attempts of a step, if the called service names none.
PAUSES = (timedelta(seconds=1), timedelta(seconds=2), timedelta(seconds=5), timedelta(seconds=10))


class StepFailed(Exception):
    """The step has failed for good, and the journal says so. The text is for the operator."""


class _Result(NamedTuple):
    """The result of a step's call."""

    content: bytes
    """Sealed."""
    metered: MeteredCall | None
    ms: int = 0
    """Duration of the call."""


class UnrecordedResults:
    """Results of this process's calls whose end is not recorded yet, by run, step, attempt and retries.

    While the database is away a result cannot be recorded, and the lane is lost. If this process claims the lane again
    and the journal still has the same attempt open, the result is recorded then and the call is not made again.
    """

    MOST = 1_000
    """If there are more, the oldest is dropped, and its call would be made again."""

    def __init__(self) -> None:
        self._results: dict[tuple[UUID, int, int, int], _Result] = {}

    def keep(self, key: tuple[UUID, int, int, int], result: _Result) -> None:
        self._results[key] = result
        if len(self._results) > self.MOST:
            del self._results[next(iter(self._results))]

    def get(self, key: tuple[UUID, int, int, int]) -> _Result | None:
        return self._results.get(key)

    def drop(self, key: tuple[UUID, int, int, int]) -> None:
        self._results.pop(key, None)


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
    lost: Callable[[bool], MeteredCall | None] = lambda in_other_process: None
    """Estimates the usage of an attempt without a result. The argument: another process made the attempt."""


Call = Callable[[str, int], Coroutine[Any, Any, tuple[T, MeteredCall | None]]]
"""Takes the idempotency key and the attempt, returns the content and its usage."""


class Steps:
    """Makes the steps of one run in order and records them in its journal.

    A process that dies during a call leaves a started step behind. The next worker makes that step again: its effect
    may happen twice, or the called service knows its idempotency key.
    """

    def __init__(
        self, context: RunContext, effects: Effects, journal: RunJournal, watch: Watch, unrecorded: UnrecordedResults
    ) -> None:
        self._context = context
        self._effects = effects
        self._journal = journal
        self._watch = watch
        self._unrecorded = unrecorded

    def next_has_begun(self) -> bool:
        """True if the journal has the next step, ended or not."""
        return self._next() is not None

    def next_has_ended(self) -> bool:
        """True if the journal has the next step with its end."""
        return self.has_ended(1)

    def has_ended(self, offset: int) -> bool:
        """True if the journal has the step that comes `offset` steps after the last one, with its end."""
        known = self._context.state.steps.get(self._context.last_step + offset)
        return known is not None and known.status != "started"

    def next_digest(self) -> str | None:
        """The digest of the next step in the journal; None if it has none."""
        known = self._next()
        return known.digest if known else None

    def _next(self) -> Step | None:
        return self._context.state.steps.get(self._context.last_step + 1)

    async def make(self, spec: StepSpec, call: Call[T], type_: type[T], *, expected_messages: int | None = None) -> T:
        """The content of the next step. Steps at the same time are numbered in the order of these calls.

        Raises StepFailed; Ended if a limit or a cancellation forbids the step; Transient if it is to be tried again;
        Mismatch if the journal has another step at this place; MessagesArrived if a new step would begin and the run
        has other than the expected messages.
        """
        expected = None if self.next_has_begun() else expected_messages
        n, known = self._enter(spec)
        if known is None:
            text = await self._make(n, spec, call, expected)
        elif known.content is None:
            raise StepFailed(known.error or "")
        else:
            text = self._open(n, known.content)
        return msgspec.json.decode(text, type=type_)

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

    async def end_for_child(self, n: int, result: ToolResult | None, error: str | None) -> None:
        """Records the answer of the other run as the end of step `n`. `result` is None if that run failed."""
        content = None
        if result is not None:
            content = self._context.key.seal(msgspec.json.encode(result).decode(), *self._sealing(n))
        await self._journal.end(EndStep(self._context.session_key, n, 1, 0, content, _stored(error)), None)

    async def refuse(self, spec: StepSpec, reason: str) -> None:
        """Records that the next step is not made."""
        context = self._context
        has_ended = self.next_has_ended()
        context.last_step += 1
        n, key = context.last_step, context.session_key
        if has_ended:
            check(context.state, n, spec.kind, spec.name, spec.digest, VERSION)
            return
        begin = BeginStep(key, n, spec.kind, spec.name, 1, spec.digest, VERSION)
        await self._journal.refuse(begin, EndStep(key, n, 1, 0, None, reason))

    async def record_messages(self, count: int) -> None:
        """From the next step on the run answers its first `count` messages."""
        context = self._context
        await self._journal.take_messages(TakeMessages(context.session_key, context.last_step + 1, count))

    def decision_on_next(self, offset: int) -> str | None:
        """The decision of a person about the step that comes `offset` steps after the last one."""
        return self._context.state.decisions.get(self._context.last_step + offset)

    def ask_for_approval(self, offset: int, tool: str, arguments: str, *, of_asker: bool) -> Suspended:
        """The run has to wait until a person has decided about that step."""
        context, n = self._context, self._context.last_step + offset
        sealed = context.key.seal(
            arguments, context.tenant_id, context.subject_id, f"{context.run_id}/{n}", "arguments"
        )
        text = f"step {n}, tool {tool}: waits for approval"
        command = Suspend(context.session_key, "approval", n, tool, text, sealed)
        return Suspended(command, approval_question(tool, arguments, of_asker=of_asker))

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

    async def _make(self, n: int, spec: StepSpec, call: Call[T], expected_messages: int | None) -> str:
        """The step's content as JSON. Raises StepFailed, Ended, RetryLater, and the other errors of the call."""
        context = self._context
        known = context.state.steps.get(n)
        retries = known.settled if known else 0
        if known and (kept := self._unrecorded.get((context.run_id, n, known.attempt, retries))):
            await self._record((context.run_id, n, known.attempt, retries), kept)
            return self._open(n, kept.content)
        attempt = known.attempt + 1 if known else 1
        # The process of the attempt before is gone, so it is not known how that attempt ended.
        lost = spec.lost(True) if known and not known.failed_attempt else None
        await self._begin(n, spec, attempt, lost, expected_messages)
        failpoint("after_effect_started")
        self._effects.lease.check()
        began = time.monotonic()
        # A step that a person wants made again is a new call, with a new key.
        key = self._effects.idempotency_key(f"{context.run_id}/{n}" + (f"/{retries}" if retries else ""))
        text, made = "", None
        error: str | None = None
        cancelled = False
        try:
            value, metered = await self._try(spec, attempt, call(key, attempt))
            text = msgspec.json.encode(value).decode()
            made = _Result(context.key.seal(text, *self._sealing(n)), metered, _ms_since(began))
        except EffectFailed as failure:
            error = failure.reason
        except CancelRequested:
            error, cancelled = CANCELLED, True
        except RetryLater as later:
            command = FailAttempt(context.session_key, n, attempt, redacted(str(later)))
            await self._journal.fail_attempt(command, spec.lost(False))
            raise
        failpoint("after_effect_call")
        if made:
            await self._record((context.run_id, n, attempt, retries), made)
            return text
        end = EndStep(context.session_key, n, attempt, _ms_since(began), None, _stored(error))
        await self._journal.end(end, spec.lost(False))
        if cancelled:
            raise Ended("cancelled", CANCELLED)
        raise StepFailed(error or "")

    async def _record(self, key: tuple[UUID, int, int, int], made: _Result) -> None:
        """Submits the result as the step's end, and keeps it in memory until that is committed."""
        _, n, attempt, _ = key
        metered = made.metered
        usage = metered.usage if metered else Usage()
        tokens = (usage.input_tokens or 0) + (usage.output_tokens or 0)
        nanos = metered.nanos if metered else 0
        end = EndStep(self._context.session_key, n, attempt, made.ms, made.content, None, tokens, nanos)
        self._unrecorded.keep(key, made)
        await self._journal.end(end, metered, recorded=lambda: self._unrecorded.drop(key))

    async def _begin(
        self,
        n: int,
        spec: StepSpec,
        attempt: int,
        lost: MeteredCall | None = None,
        expected_messages: int | None = None,
    ) -> None:
        """Commits the step's start. `lost` is the estimated usage of the attempt before."""
        command = BeginStep(self._context.session_key, n, spec.kind, spec.name, attempt, spec.digest, VERSION)
        try:
            _, span_id = current_ids()
            await self._journal.begin(command, span_id, lost, expected_messages)
        except RunStopped:
            raise Ended("cancelled", CANCELLED) from None
        except MessagesArrived:
            self._context.last_step -= 1
            raise

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
            if not error.transient:
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

    def _sealing(self, n: int) -> tuple[str, ...]:
        return self._context.tenant_id, self._context.subject_id, f"{self._context.run_id}/{n}", "content"

    def _open(self, n: int, content: bytes) -> str:
        return self._context.key.open(content, *self._sealing(n))


def digest(*parts: object) -> str:
    """A short hash of a step's input, which shows whether the input is still the same."""
    return hashlib.blake2b(msgspec.json.encode(parts), digest_size=8).hexdigest()


def _stored(error: str | None) -> str | None:
    return None if error is None else storable(redacted(error))[:4000]


def _ms_since(began: float) -> int:
    """Rounded up, so that every call took some time and its run has a record of its seconds."""
    return math.ceil((time.monotonic() - began) * 1000)
