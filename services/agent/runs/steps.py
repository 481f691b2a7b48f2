"""Steps of a run, each made once: taken from the journal where it is there, otherwise made and journaled.

Before the call *started* is committed, with the fact; after it what came out, with the fact and what it has used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar
from uuid import UUID

import grpc.aio
import msgspec
from opentelemetry import trace

from infra.clock import utcnow
from infra.crypto import DataKey
from infra.effects import Effects, Outcome
from infra.errors import EffectFailed, InvalidMessage, NotFound, RetryLater, TooLarge, Transient
from infra.tx import Tx
from protos.catalog import USAGE_RECORDS
from protos.messages.billing import UsageRecorded
from services.agent.models.contract import ModelFailed, Usage
from services.agent.runs import projections
from services.agent.runs.domain import BeginStep, EndStep, Limits, Run, check, exceeded, remaining
from services.agent.runs.ending import CANCELLED, FAILED, Ended
from services.agent.runs.events import StepKind
from services.agent.runs.publishing import stream
from services.agent.runs.watch import CancelRequested, Watch

T = TypeVar("T")

# Between attempts of a step, where the other side does not say how long.
PAUSES = (timedelta(seconds=1), timedelta(seconds=2), timedelta(seconds=5), timedelta(seconds=10))


class StepFailed(Exception):
    """The step has failed for good, and is in the journal so. The text is for the operator."""


class Metered(msgspec.Struct, frozen=True):
    """What a step has used. hold_id: the reservation that the record closes."""

    resource: str
    usage: Usage
    hold_id: UUID


class _Made(msgspec.Struct, frozen=True):
    """What the ledger of effects keeps of a step. content: sealed."""

    content: bytes
    metered: Metered | None


@dataclass
class Scope:
    """The run that steps are made for. journal: as it was when the worker began, then kept up; n: of the last step."""

    run_id: UUID
    tenant_id: str
    session_key: str
    subject_id: str
    key: DataKey
    limits: Limits
    journal: Run
    n: int = 0


@dataclass(frozen=True)
class Step:
    """What is to be done. attempts: how often what passes by itself is tried; None: as long as the run has time."""

    kind: StepKind
    name: str
    effect: Literal["repeatable", "keyed"]
    attempts: int | None = None


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
        steps = self._scope.journal.steps
        return self._scope.n >= len(steps) or steps[self._scope.n].status == "started"

    async def step(self, step: Step, call: Call[T], type_: type[T]) -> T:
        """What came out of the next step.

        Raises StepFailed; Ended where a limit or a cancel forbids it; Transient where it is to be tried again;
        Mismatch where the journal has another step here.
        """
        scope = self._scope
        is_new = self.next_is_new()
        scope.n += 1
        if not is_new:
            check(scope.journal, scope.n, step.kind, step.name)
            known = scope.journal.steps[scope.n - 1]
            if known.content is None:
                raise StepFailed(known.error or "")
            return msgspec.json.decode(self._open(known.content), type=type_)
        if scope.n > len(scope.journal.steps) and (reason := exceeded(scope.journal, scope.limits, utcnow())):
            raise Ended("failed", reason, FAILED)
        outcome = await self._make(step, call)
        if outcome.state != "succeeded":
            raise StepFailed(outcome.error or "")
        assert outcome.result
        return msgspec.json.decode(self._open(outcome.result.content), type=type_)

    async def _make(self, step: Step, call: Call[T]) -> Outcome[_Made]:
        scope = self._scope
        n, attempt, began, cancelled = scope.n, 0, 0.0, False

        async def before(tx: Tx, number: int) -> None:
            nonlocal attempt, began
            attempt, began = number, time.monotonic()
            if await tx.sql("SELECT 1 FROM run WHERE id = $1 AND cancel_requested", scope.run_id):
                raise Ended("cancelled", CANCELLED)
            await tx.decide(stream(scope.run_id), BeginStep(scope.session_key, n, step.kind, step.name, number))
            await projections.step_started(tx, scope.run_id, n, step.kind, step.name, number, _span_id())

        async def make(idempotency_key: str) -> _Made:
            nonlocal cancelled
            try:
                value, metered = await self._tried(step, attempt, call(idempotency_key, attempt))
            except CancelRequested:
                cancelled = True
                raise EffectFailed(CANCELLED) from None
            content = msgspec.json.encode(value).decode()
            return _Made(scope.key.seal(content, *self._context(n)), metered)

        async def after(tx: Tx, outcome: Outcome[_Made]) -> None:
            await self._end(tx, n, attempt, round((time.monotonic() - began) * 1000), outcome)

        key = f"{scope.run_id}/{n}"
        outcome = await self._effects.run(key, make, kind=step.effect, result=_Made, before=before, after=after)
        if cancelled:
            raise Ended("cancelled", CANCELLED)
        return outcome

    async def _tried(self, step: Step, attempt: int, call: Coroutine[Any, Any, T]) -> T:
        """`call`, with what it raises told apart: EffectFailed for good, RetryLater to be tried again."""
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
        pause = after if after is not None else PAUSES[min(attempt, len(PAUSES)) - 1]
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
        await tx.decide(
            stream(scope.run_id), EndStep(scope.session_key, n, attempt, duration_ms, content, error, tokens)
        )
        await projections.step_completed(tx, scope.run_id, n, "completed" if made else "failed", duration_ms, error)
        if made and made.metered:
            record = _usage_record(scope, n, attempt, made.metered)
            tx.publish(USAGE_RECORDS, record, key=scope.tenant_id)
            await projections.used(tx, record, usage)
        scope.journal = await tx.load(stream(scope.run_id))

    def _context(self, n: int) -> tuple[str, ...]:
        return self._scope.tenant_id, self._scope.subject_id, f"{self._scope.run_id}/{n}", "content"

    def _open(self, content: bytes) -> str:
        return self._scope.key.open(content, *self._context(self._scope.n))


def _usage_record(scope: Scope, n: int, attempt: int, metered: Metered) -> UsageRecorded:
    usage = msgspec.structs.asdict(metered.usage)
    return UsageRecorded(
        tenant_id=scope.tenant_id,
        usage_id=f"{scope.run_id}/{n}/{attempt}",
        resource=metered.resource,
        # Nothing reported is still a call, which somebody has to look at; it is not made up here what it used.
        quantities={unit: count for unit, count in usage.items() if count is not None} or {"calls": 1},
        occurred_at=utcnow(),
        run_id=scope.run_id,
        hold_id=metered.hold_id,
    )


def _span_id() -> str | None:
    context = trace.get_current_span().get_span_context()
    return f"{context.span_id:016x}" if context.is_valid else None
