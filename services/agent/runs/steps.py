"""Steps of a run, each made once: taken from the journal where it is there, otherwise made and journaled.

Before the call *started* is committed, with the fact; after it what came out, with the fact and what it has used.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar
from uuid import UUID

import grpc.aio
import msgspec
from opentelemetry import trace

from infra import VERSION
from infra.clock import utcnow
from infra.crypto import DataKey
from infra.effects import Effects, Outcome
from infra.errors import Conflict, EffectFailed, InvalidMessage, NotFound, RetryLater, TooLarge, Transient
from infra.subjects import Erased, SubjectKeys
from infra.tx import Tx
from protos.catalog import USAGE_RECORDS
from protos.messages.billing import UsageRecorded
from services.agent.models.contract import ModelFailed, Usage
from services.agent.runs import projections
from services.agent.runs.domain import (
    BeginStep,
    EndStep,
    Limits,
    Run,
    Suspend,
    TakeMessages,
    check,
    exceeded,
    remaining,
)
from services.agent.runs.ending import CANCELLED, FAILED, Ended, Suspended, approval_notice
from services.agent.runs.events import StepKind
from services.agent.runs.publishing import stream
from services.agent.runs.watch import CancelRequested, Watch

T = TypeVar("T")

# Between attempts of a step, where the other side does not say how long.
PAUSES = (timedelta(seconds=1), timedelta(seconds=2), timedelta(seconds=5), timedelta(seconds=10))


class StepFailed(Exception):
    """The step has failed for good, and is in the journal so. The text is for the operator."""


class Metered(msgspec.Struct, frozen=True):
    """What a step has used. hold_id: the reservation that the record closes, and nanos what was reserved; None: the
    reservation is left to another attempt."""

    resource: str
    usage: Usage
    hold_id: UUID | None
    nanos: int = 0


class ToolResult(msgspec.Struct, frozen=True):
    """A tool's result as the journal keeps it. `unknown`: nobody knows whether it took effect, and why."""

    result: str
    unknown: str | None = None


class _Made(msgspec.Struct, frozen=True):
    """What the ledger of effects keeps of a step. content: sealed."""

    content: bytes
    metered: Metered | None


@dataclass
class Scope:
    """The run that steps are made for. depth: how many runs asked for each other before it. journal: as it was when the
    worker began, then kept up; n: of the last step."""

    run_id: UUID
    tenant_id: str
    session_key: str
    subject_id: str
    key: DataKey
    limits: Limits
    depth: int
    journal: Run
    n: int = 0

    def reserved(self) -> dict[str, int]:
        """Usage id → what was reserved for it."""
        return {usage_id(self.run_id, n, attempt): nanos for (n, attempt), nanos in self.journal.reserved.items()}


@dataclass(frozen=True)
class Step:
    """What is to be done. digest: of what goes into it.

    attempts: how often what passes by itself is tried; None: as long as the run has time. patience: the longest pause
    before another attempt. lost: what an attempt is reckoned to have used that did not come to an answer; the argument
    says whether another process made it.
    """

    kind: StepKind
    name: str
    effect: Literal["repeatable", "keyed"]
    digest: str
    attempts: int | None = None
    patience: timedelta = timedelta.max
    lost: Callable[[bool], Metered | None] = lambda elsewhere: None


Call = Callable[[str, int], Coroutine[Any, Any, tuple[T, Metered | None]]]
"""Takes the idempotency key and the attempt, gives the content and what it used."""


class Journal:
    """Makes the steps of one run, in order."""

    def __init__(self, scope: Scope, effects: Effects, watch: Watch) -> None:
        self._scope = scope
        self._effects = effects
        self._watch = watch

    def next_is_new(self) -> bool:
        """True where the next step is not in the journal with its end."""
        known = self._scope.journal.steps.get(self._scope.n + 1)
        return known is None or known.status == "started"

    def next_digest(self) -> str | None:
        """Of the next step, as the journal has it; None where it has none."""
        known = self._scope.journal.steps.get(self._scope.n + 1)
        return known.digest if known else None

    def next_is_unknown(self) -> bool:
        """True where the journal has no next step, not even its beginning."""
        return self._scope.n + 1 not in self._scope.journal.steps

    async def step(self, step: Step, call: Call[T], type_: type[T]) -> T:
        """What came out of the next step. Of several at once each has its number by the order of these calls.

        Raises StepFailed; Ended where a limit or a cancel forbids it; Transient where it is to be tried again;
        Mismatch where the journal has another step here.
        """
        scope = self._scope
        is_new, is_unknown = self.next_is_new(), self.next_is_unknown()
        scope.n += 1
        n = scope.n
        if not is_new:
            check(scope.journal, n, step.kind, step.name, step.digest, VERSION)
            known = scope.journal.steps[n]
            if known.content is None:
                raise StepFailed(known.error or "")
            return msgspec.json.decode(self._open(n, known.content), type=type_)
        if is_unknown and (reason := exceeded(scope.journal, scope.limits, n, utcnow())):
            raise Ended("failed", reason, FAILED)
        outcome = await self._make(n, step, call)
        if outcome.state != "succeeded":
            raise StepFailed(outcome.error or "")
        assert outcome.result
        return msgspec.json.decode(self._open(n, outcome.result.content), type=type_)

    async def begun(self, step: Step) -> ToolResult | None:
        """What came out of the next step, which others make; None: nothing yet. Raises StepFailed, Ended, Mismatch."""
        scope = self._scope
        is_new, is_unknown = self.next_is_new(), self.next_is_unknown()
        scope.n += 1
        if not is_new:
            check(scope.journal, scope.n, step.kind, step.name, step.digest, VERSION)
            known = scope.journal.steps[scope.n]
            if known.content is None:
                raise StepFailed(known.error or "")
            return msgspec.json.decode(self._open(scope.n, known.content), type=ToolResult)
        if is_unknown:
            if reason := exceeded(scope.journal, scope.limits, scope.n, utcnow()):
                raise Ended("failed", reason, FAILED)
            n = scope.n
            async with self._effects.begin() as tx:
                await self._begin(tx, n, step, 1)
                scope.journal = await tx.load(stream(scope.run_id))
        return None

    async def ended(self, n: int, result: str | None, error: str | None) -> None:
        """Writes down what others made of step `n`; the result is None where it failed."""
        made = None
        if result is not None:
            content = msgspec.json.encode(ToolResult(result)).decode()
            made = _Made(self._scope.key.seal(content, *self._context(n)), None)
        async with self._effects.begin() as tx:
            await self._end(tx, n, 1, 0, Outcome("succeeded" if made else "failed", made, error, 1, saved=False))

    async def refuse(self, step: Step, reason: str) -> None:
        """Writes down that the next step is not made."""
        scope = self._scope
        is_new = self.next_is_new()
        scope.n += 1
        if not is_new:
            check(scope.journal, scope.n, step.kind, step.name, step.digest, VERSION)
            return
        async with self._effects.begin() as tx:
            await self._begin(tx, scope.n, step, 1)
            await self._end(tx, scope.n, 1, 0, Outcome("failed", None, reason, 1, saved=False))

    async def take_messages(self, count: int) -> None:
        """From the next step on the run has so many of its messages."""
        scope = self._scope
        async with self._effects.begin() as tx:
            await tx.decide(stream(scope.run_id), TakeMessages(scope.session_key, scope.n + 1, count))
            scope.journal = await tx.load(stream(scope.run_id))

    def approval(self, offset: int) -> str | None:
        """What a person has decided about the step that comes `offset` steps after the last one."""
        return self._scope.journal.decisions.get(self._scope.n + offset)

    def ask(self, offset: int, tool: str, arguments: str) -> Suspended:
        """The run stops until a person has decided about that step."""
        scope, n = self._scope, self._scope.n + offset
        sealed = scope.key.seal(arguments, scope.tenant_id, scope.subject_id, f"{scope.run_id}/{n}", "arguments")
        text = f"step {n}, tool {tool}: waits for approval"
        command = Suspend(scope.session_key, "approval", n, tool, text, utcnow(), sealed)
        return Suspended(command, approval_notice(tool, arguments))

    async def _make(self, n: int, step: Step, call: Call[T]) -> Outcome[_Made]:
        scope = self._scope
        attempt, began, cancelled = 0, 0.0, False

        async def before(tx: Tx, number: int, lost: bool) -> None:
            nonlocal attempt, began
            attempt, began = number, time.monotonic()
            if lost and (metered := step.lost(True)):
                await self._used(tx, n, number - 1, metered, estimated=True)
            if await tx.sql("SELECT 1 FROM run WHERE id = $1 AND cancel_reason IS NOT NULL", scope.run_id):
                raise Ended("cancelled", CANCELLED)
            await self._begin(tx, n, step, number)

        async def make(idempotency_key: str) -> _Made:
            nonlocal cancelled
            try:
                value, metered = await self._tried(n, step, attempt, call(idempotency_key, attempt))
            except CancelRequested:
                cancelled = True
                raise EffectFailed(CANCELLED) from None
            content = msgspec.json.encode(value).decode()
            return _Made(scope.key.seal(content, *self._context(n)), metered)

        async def after(tx: Tx, outcome: Outcome[_Made]) -> None:
            await self._end(tx, n, attempt, round((time.monotonic() - began) * 1000), outcome)

        # What a person had made again is another effect, with another key.
        settled = scope.journal.steps[n].settled if n in scope.journal.steps else 0
        key = f"{scope.run_id}/{n}" + (f"/{settled}" if settled else "")
        outcome = await self._effects.run(key, make, kind=step.effect, result=_Made, before=before, after=after)
        if cancelled:
            raise Ended("cancelled", CANCELLED)
        return outcome

    async def _begin(self, tx: Tx, n: int, step: Step, attempt: int) -> None:
        run_id, key = self._scope.run_id, self._scope.session_key
        await tx.decide(stream(run_id), BeginStep(key, n, step.kind, step.name, attempt, step.digest, VERSION))
        await projections.step_started(tx, run_id, n, step.kind, step.name, attempt, _span_id())

    async def _tried(self, n: int, step: Step, attempt: int, call: Coroutine[Any, Any, T]) -> T:
        """`call`, with what it raises told apart: EffectFailed for good, RetryLater to be tried again.

        What it has used all the same is told.
        """
        try:
            return await self._try(step, attempt, call)
        except (EffectFailed, RetryLater, CancelRequested):
            if metered := step.lost(False):
                async with self._effects.begin() as tx:
                    await self._used(tx, n, attempt, metered, estimated=True)
            raise

    async def _try(self, step: Step, attempt: int, call: Coroutine[Any, Any, T]) -> T:
        seconds = remaining(self._scope.journal, self._scope.limits, utcnow())
        after: timedelta | None = None
        try:
            return await self._watch.guard(self._scope.run_id, call, seconds)
        except TimeoutError:
            raise EffectFailed(f"the limit of {self._scope.limits.seconds} seconds is reached") from None
        except (InvalidMessage, NotFound, TooLarge) as error:
            raise EffectFailed(str(error)) from error
        except ModelFailed as error:
            if not error.passing:
                raise EffectFailed(error.reason) from error
            after, reason = error.after, error.reason
        except (Transient, grpc.aio.AioRpcError) as error:
            after, reason = (error.after if isinstance(error, RetryLater) else None), str(error)
        # Not all at the same moment: what was too busy for them would be so again.
        pause = after if after is not None else PAUSES[min(attempt, len(PAUSES)) - 1] * random.uniform(0.5, 1.0)
        if pause > step.patience:
            raise EffectFailed(f"{reason} (and nobody waits {pause.total_seconds():.0f} s for it)")
        if step.attempts is not None and attempt >= step.attempts:
            raise EffectFailed(f"{reason} (after {attempt} attempts)")
        if pause.total_seconds() >= seconds:
            raise EffectFailed(f"{reason} (and the time of the run does not suffice to try again)")
        raise RetryLater(pause, reason)

    async def _end(self, tx: Tx, n: int, attempt: int, duration_ms: int, outcome: Outcome[_Made]) -> None:
        scope, made = self._scope, outcome.result
        usage = made.metered.usage if made and made.metered else Usage()
        tokens = (usage.input_tokens or 0) + (usage.output_tokens or 0)
        content, error = made.content if made else None, outcome.error
        nanos = made.metered.nanos if made and made.metered else 0
        await tx.decide(
            stream(scope.run_id), EndStep(scope.session_key, n, attempt, duration_ms, content, error, tokens, nanos)
        )
        await projections.step_completed(tx, scope.run_id, n, "completed" if made else "failed", duration_ms, error)
        if made and made.metered:
            await self._used(tx, n, attempt, made.metered)
        scope.journal = await tx.load(stream(scope.run_id))

    async def _used(self, tx: Tx, n: int, attempt: int, metered: Metered, *, estimated: bool = False) -> None:
        record = _usage_record(self._scope, n, attempt, metered, estimated)
        tx.publish(USAGE_RECORDS, record, key=self._scope.tenant_id)
        await projections.used(tx, record, metered.usage)

    def _context(self, n: int) -> tuple[str, ...]:
        return self._scope.tenant_id, self._scope.subject_id, f"{self._scope.run_id}/{n}", "content"

    def _open(self, n: int, content: bytes) -> str:
        return self._scope.key.open(content, *self._context(n))


async def seal_result(tx: Tx, subjects: SubjectKeys, run_id: UUID, step: int, result: object) -> bytes:
    """A tool's result, any JSON, as the content of a step that was not made."""
    [(tenant_id, subject_id)] = await tx.sql("SELECT tenant_id, subject_id FROM run WHERE id = $1", run_id)
    content = msgspec.json.encode(ToolResult(msgspec.json.encode(result).decode())).decode()
    try:
        key = await subjects.key(tx, tenant_id, subject_id)
    except Erased as error:
        raise Conflict(f"run {run_id}: the person was erased") from error
    return key.seal(content, tenant_id, subject_id, f"{run_id}/{step}", "content")


def digest(*parts: object) -> str:
    """A short hash of what goes into a step, to tell whether it is still the same."""
    return hashlib.blake2b(msgspec.json.encode(parts), digest_size=8).hexdigest()


def _usage_record(scope: Scope, n: int, attempt: int, metered: Metered, estimated: bool) -> UsageRecorded:
    usage = msgspec.structs.asdict(metered.usage)
    return UsageRecorded(
        tenant_id=scope.tenant_id,
        usage_id=usage_id(scope.run_id, n, attempt),
        resource=metered.resource,
        # Nothing reported is still a call, which somebody has to look at; it is not made up here what it used.
        quantities={unit: count for unit, count in usage.items() if count is not None} or {"calls": 1},
        occurred_at=utcnow(),
        estimated=estimated,
        run_id=scope.run_id,
        hold_id=metered.hold_id,
    )


def usage_id(run_id: UUID, n: int, attempt: int) -> str:
    return f"{run_id}/{n}/{attempt}"


def _span_id() -> str | None:
    context = trace.get_current_span().get_span_context()
    return f"{context.span_id:016x}" if context.is_valid else None
