"""Steps of a run, each made once: taken from the journal where it is there, otherwise made and journaled.

Before the call *started* is committed, with the fact; after it what came out, with the fact and what it has used.
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
from infra.errors import Conflict, EffectFailed, InvalidMessage, NotFound, RetryLater, TooLarge, Transient
from infra.failpoint import failpoint
from infra.lanes.effects import Effects
from infra.lanes.group import ForbiddenByGuard, Group
from infra.observe.redaction import redacted
from infra.postgres.tx import Tx
from infra.security.crypto import DataKey
from infra.security.subjects import Erased, SubjectKeys
from protos.catalog import USAGE_RECORDS
from protos.messages.billing import UsageRecorded
from services.agent.execution.watch import CancelRequested, Watch
from services.agent.models.contract import ModelFailed, Usage
from services.agent.runs import projections
from services.agent.runs.domain import (
    BeginStep,
    Command,
    EndStep,
    FailAttempt,
    Limits,
    Run,
    Suspend,
    TakeMessages,
    check,
    decide,
    evolve,
    exceeded,
    remaining,
)
from services.agent.runs.events import StepKind
from services.agent.runs.notices import CANCELLED, FAILED, Ended, Suspended, approval_notice
from services.agent.runs.publishing import stream

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


class _Made(NamedTuple):
    """What came out of a step. content: sealed."""

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
    digest: str
    attempts: int | None = None
    patience: timedelta = timedelta.max
    lost: Callable[[bool], Metered | None] = lambda elsewhere: None


Call = Callable[[str, int], Coroutine[Any, Any, tuple[T, Metered | None]]]
"""Takes the idempotency key and the attempt, gives the content and what it used."""


class Journal:
    """Makes the steps of one run, in order, and writes them down: the journal is the ledger of what they did outside.

    *started* is committed before the call, its end right after it. A process that dies in between leaves *started*
    behind: then the step is made again, for its effect may happen twice, or the other side knows its key.
    """

    def __init__(self, scope: Scope, effects: Effects, group: Group, watch: Watch) -> None:
        self._scope = scope
        self._effects = effects
        self._group = group
        self._watch = watch
        # Steps that are made together write one after the other: each write counts up from the one before.
        self._turn = asyncio.Lock()

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
        content = await self._make(n, step, call)
        return msgspec.json.decode(self._open(n, content), type=type_)

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
            await self._begin(scope.n, step, 1)
        return None

    async def ended(self, n: int, result: str | None, error: str | None) -> None:
        """Writes down what others made of step `n`; the result is None where it failed."""
        made = None
        if result is not None:
            content = msgspec.json.encode(ToolResult(result)).decode()
            made = _Made(self._scope.key.seal(content, *self._context(n)), None)
        await self._end(n, 1, 0, made, error)

    async def refuse(self, step: Step, reason: str) -> None:
        """Writes down that the next step is not made."""
        scope = self._scope
        is_new = self.next_is_new()
        scope.n += 1
        n, key = scope.n, scope.session_key
        if not is_new:
            check(scope.journal, n, step.kind, step.name, step.digest, VERSION)
            return
        await self._write(
            lambda tx: projections.step_not_made(tx, scope.run_id, n, step.kind, step.name, "failed", 1, reason),
            BeginStep(key, n, step.kind, step.name, 1, step.digest, VERSION),
            EndStep(key, n, 1, 0, None, reason),
        )

    async def take_messages(self, count: int) -> None:
        """From the next step on the run has so many of its messages."""
        scope = self._scope
        await self._write(lambda tx: None, TakeMessages(scope.session_key, scope.n + 1, count))

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

    async def _make(self, n: int, step: Step, call: Call[T]) -> bytes:
        """The step's content, sealed. Raises StepFailed, Ended, RetryLater, and whatever else the call raises."""
        scope = self._scope
        known = scope.journal.steps.get(n)
        attempt = known.attempt + 1 if known else 1
        # Nobody knows how the attempt before ended: its process is gone.
        lost = step.lost(True) if known and not known.failed_attempt else None
        await self._begin(n, step, attempt, lost)
        failpoint("after_effect_started")
        self._effects.lease.check()
        began = time.monotonic()
        # What a person had made again is another call, with another key.
        settled = known.settled if known else 0
        key = self._effects.idempotency_key(f"{scope.run_id}/{n}" + (f"/{settled}" if settled else ""))
        made: _Made | None = None
        error: str | None = None
        cancelled = False
        try:
            value, metered = await self._try(step, attempt, call(key, attempt))
            made = _Made(scope.key.seal(msgspec.json.encode(value).decode(), *self._context(n)), metered)
        except EffectFailed as failure:
            error = failure.reason
        except CancelRequested:
            error, cancelled = CANCELLED, True
        except RetryLater as later:
            await self._attempt_failed(n, attempt, str(later), step.lost(False))
            raise
        failpoint("after_effect_call")
        ms = round((time.monotonic() - began) * 1000)
        await self._end(n, attempt, ms, made, error, step.lost(False) if made is None else None)
        failpoint("after_effect_commit")
        if cancelled:
            raise Ended("cancelled", CANCELLED)
        if made is None:
            raise StepFailed(error or "")
        return made.content

    async def _begin(self, n: int, step: Step, attempt: int, lost: Metered | None = None) -> None:
        """lost: what the attempt before is reckoned to have used."""
        scope, span_id = self._scope, _span_id()

        def also(tx: Tx) -> None:
            projections.step_started(tx, scope.run_id, n, step.kind, step.name, attempt, span_id)
            if lost:
                self._used(tx, n, attempt - 1, lost, estimated=True)

        command = BeginStep(scope.session_key, n, step.kind, step.name, attempt, step.digest, VERSION)
        try:
            await self._write(also, command, may_be_forbidden=True)
        except ForbiddenByGuard:
            raise Ended("cancelled", CANCELLED) from None

    async def _attempt_failed(self, n: int, attempt: int, error: str, lost: Metered | None) -> None:
        def also(tx: Tx) -> None:
            if lost:
                self._used(tx, n, attempt, lost, estimated=True)

        await self._write(also, FailAttempt(self._scope.session_key, n, attempt, redacted(error)))

    async def _end(
        self, n: int, attempt: int, ms: int, made: _Made | None, error: str | None, lost: Metered | None = None
    ) -> None:
        scope = self._scope
        metered = made.metered if made else None
        usage = metered.usage if metered else Usage()
        tokens = (usage.input_tokens or 0) + (usage.output_tokens or 0)
        error = None if error is None else redacted(error).replace("\x00", "\\x00")[:4000]

        def also(tx: Tx) -> None:
            projections.step_ended(tx, scope.run_id, n, "completed" if made else "failed", ms, error)
            if metered:
                self._used(tx, n, attempt, metered)
            elif lost:
                self._used(tx, n, attempt, lost, estimated=True)

        content, nanos = made.content if made else None, metered.nanos if metered else 0
        await self._write(also, EndStep(scope.session_key, n, attempt, ms, content, error, tokens, nanos))

    async def _write(self, also: Callable[[Tx], None], *commands: Command, may_be_forbidden: bool = False) -> None:
        """Commits what is decided, and what `also` adds, in one transaction with what other runs write now."""
        scope = self._scope
        async with self._turn:
            journal = scope.journal
            tx = self._group.buffered(scope.tenant_id)
            for command in commands:
                events = decide(command, journal)
                # Its facts are counted as its stream's versions are: nobody else writes while this worker has the run.
                tx.append_at(stream(scope.run_id), events, scope.journal.n)
                for event in events:
                    journal = evolve(journal, event)
            also(tx)
            await self._group.write(self._effects.lease, tx, scope.run_id, may_be_forbidden=may_be_forbidden)
            scope.journal = journal

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

    def _used(self, tx: Tx, n: int, attempt: int, metered: Metered, *, estimated: bool = False) -> None:
        record = _usage_record(self._scope, n, attempt, metered, estimated)
        tx.publish(USAGE_RECORDS, record, key=self._scope.tenant_id)
        projections.used(tx, record, metered.usage)

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
