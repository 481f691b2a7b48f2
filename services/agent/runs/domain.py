"""The rules of a run: which events may follow in its journal. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Literal, assert_never
from uuid import UUID

import msgspec
from msgspec.structs import replace

from services.agent.runs.events import (
    AttemptFailed,
    Decision,
    Ending,
    Event,
    MessagesTaken,
    Reason,
    RunCompleted,
    RunFailed,
    RunForked,
    RunStarted,
    RunSuspended,
    StepCompleted,
    StepKind,
    StepSettled,
    StepStarted,
)


class Step(msgspec.Struct, frozen=True):
    """A step in the journal."""

    kind: StepKind
    name: str
    status: Literal["started", "completed", "failed"] = "started"
    content: bytes | None = None
    """Sealed."""
    error: str | None = None
    attempt: int = 1
    digest: str = ""
    """Of the step's input; empty in older events."""
    code: str = ""
    """The version that began the step; empty in older events."""
    settled: int = 0
    """How often a person had the step made again."""
    failed_attempt: bool = False
    """The last attempt failed and its end is recorded."""

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}" + (f" of {self.digest}" if self.digest else "")


class Suspension(msgspec.Struct, frozen=True):
    """The decision that the run waits for."""

    reason: Reason
    step: int
    name: str
    text: str
    at: datetime
    arguments: bytes | None = None
    """Of the tool, sealed."""


class Run(msgspec.Struct, frozen=True):
    """A run's state, folded from its journal."""

    n: int = 0
    """Number of events so far."""
    started_at: datetime | None = None
    agent_version: int | None = None
    attempts: int = 0
    tokens: int = 0
    messages: int | None = None
    """How many messages the run started with; None: all."""
    taken: Mapping[int, int] = msgspec.field(default_factory=dict)
    """Step → how many of its messages the run answers from that step on."""
    steps: Mapping[int, Step] = msgspec.field(default_factory=dict)
    """By number, from 1. Tools that are called at the same time begin in any order."""
    suspended: Suspension | None = None
    waited_since: datetime | None = None
    decisions: Mapping[int, Decision] = msgspec.field(default_factory=dict)
    """Step → the decision of a person about its tool call."""
    reserved: Mapping[tuple[int, int], int] = msgspec.field(default_factory=dict)
    """(step, attempt) of a model call → nano-units reserved for it."""
    busy_ms: int = 0
    """How long the steps took. Of the calls that are made at the same time, the longest counts."""
    longest_ms: int = 0
    """The longest of the calls at the same time, until all of them have ended."""
    over: bool = False


class Start(msgspec.Struct, frozen=True):
    session_key: str
    agent_id: UUID
    agent_version: int
    at: datetime
    messages: int


class Fork(msgspec.Struct, frozen=True):
    session_key: str
    origin: UUID
    messages: int | None
    agent_version: int | None


class TakeMessages(msgspec.Struct, frozen=True):
    """From `step` on the run answers its first `messages` messages."""

    session_key: str
    step: int
    messages: int


class BeginStep(msgspec.Struct, frozen=True):
    session_key: str
    step: int
    kind: StepKind
    name: str
    attempt: int
    digest: str = ""
    code: str = ""


class FailAttempt(msgspec.Struct, frozen=True):
    session_key: str
    step: int
    attempt: int
    error: str


class EndStep(msgspec.Struct, frozen=True):
    session_key: str
    step: int
    attempts: int
    duration_ms: int
    content: bytes | None = None
    error: str | None = None
    tokens: int = 0
    nanos: int = 0


class Suspend(msgspec.Struct, frozen=True):
    session_key: str
    reason: Reason
    step: int
    name: str
    text: str
    arguments: bytes | None = None
    at: datetime | None = None
    """Set when it is written, by the clock of the database."""


class Settle(msgspec.Struct, frozen=True):
    session_key: str
    step: int
    decision: Decision
    by: str
    content: bytes | None = None


class Complete(msgspec.Struct, frozen=True):
    session_key: str
    reply: bytes
    calls: bytes | None = None
    finish_reason: Literal["stop", "length"] = "stop"
    filtered: bool = False


class Fail(msgspec.Struct, frozen=True):
    session_key: str
    status: Ending
    error: str


Command = Start | Fork | TakeMessages | BeginStep | FailAttempt | EndStep | Suspend | Settle | Complete | Fail

FITTING: Mapping[Reason, tuple[Decision, ...]] = {
    "approval": ("approve", "deny"),
    "indeterminate": ("retry", "skip"),
    "agent": ("answer",),
}


class Mismatch(Exception):
    """The journal has another step than the one to be made, so the run cannot go on safely."""


class NotWaiting(Exception):
    """The run does not wait for this decision."""


def decide(command: Command, run: Run) -> list[Event]:
    """The events that follow from the command; none if the run is over.

    Raises Mismatch if the command contradicts the journal, NotWaiting if the run does not wait for the decision.
    """
    if run.over:
        return []
    n = run.n + 1
    match command:
        case Start():
            return [_start(command, run)]
        case Fork(key, origin, messages, version):
            return [RunForked(n=n, session_key=key, origin=origin, messages=messages, agent_version=version)]
        case TakeMessages(key, step, messages):
            if messages <= messages_at(run, step):
                return []
            return [MessagesTaken(n=n, session_key=key, step=step, messages=messages)]
        case BeginStep(key, step, kind, name, attempt, digest, code):
            if known := run.steps.get(step):
                check(run, step, kind, name, digest, code)
                if known.status != "started":
                    raise Mismatch(f"step {step} is {known.status} already and must not begin again")
            return [
                StepStarted(
                    n=n, session_key=key, step=step, kind=kind, name=name, attempt=attempt, digest=digest, code=code
                )
            ]
        case FailAttempt(key, step, attempt, error):
            return [AttemptFailed(n=n, session_key=key, step=step, attempt=attempt, error=error)]
        case EndStep():
            return [_end_step(command, run)]
        case Suspend(key, reason, step, name, text, arguments, at):
            assert at
            return [
                RunSuspended(
                    n=n,
                    session_key=key,
                    reason=reason,
                    step=step,
                    name=name,
                    text=text,
                    at=at,
                    arguments=arguments,
                )
            ]
        case Settle(key, step, decision, by, content):
            waits = run.suspended
            if waits is None or waits.step != step or decision not in FITTING[waits.reason]:
                raise NotWaiting(f"step {step} does not wait to be decided as {decision}")
            return [StepSettled(n=n, session_key=key, step=step, decision=decision, by=by, content=content)]
        case Complete(key, reply, calls, finish_reason, filtered):
            return [
                RunCompleted(
                    n=n, session_key=key, reply=reply, calls=calls, finish_reason=finish_reason, filtered=filtered
                )
            ]
        case Fail(key, status, error):
            return [RunFailed(n=n, session_key=key, status=status, error=error)]
        case _:
            assert_never(command)


def _start(command: Start, run: Run) -> RunStarted:
    return RunStarted(
        n=run.n + 1,
        session_key=command.session_key,
        agent_id=command.agent_id,
        agent_version=run.agent_version or command.agent_version,
        attempt=run.attempts + 1,
        at=command.at,
        messages=command.messages if run.messages is None else run.messages,
    )


def _end_step(command: EndStep, run: Run) -> StepCompleted:
    step = run.steps.get(command.step)
    if step is None:
        raise Mismatch(f"step {command.step} has not begun and cannot end")
    if step.status != "started":
        raise Mismatch(f"step {command.step} is {step.status} already and cannot end again")
    return StepCompleted(
        n=run.n + 1,
        session_key=command.session_key,
        step=command.step,
        kind=step.kind,
        name=step.name,
        status="failed" if command.content is None else "completed",
        attempts=command.attempts,
        duration_ms=command.duration_ms,
        content=command.content,
        error=command.error,
        tokens=command.tokens,
        nanos=command.nanos,
    )


def evolve(run: Run, event: Event) -> Run:
    run = replace(run, n=event.n)
    match event:
        case RunStarted():
            started_at = run.started_at or event.at
            if run.waited_since:
                # The time in which the run waited for a decision does not count.
                started_at += event.at - run.waited_since
            return replace(
                run,
                attempts=event.attempt,
                agent_version=event.agent_version,
                messages=event.messages,
                started_at=started_at,
                waited_since=None,
            )
        case RunForked():
            return replace(run, messages=event.messages, agent_version=event.agent_version)
        case MessagesTaken():
            return replace(run, taken={**run.taken, event.step: event.messages})
        case StepStarted():
            settled = run.steps[event.step].settled if event.step in run.steps else 0
            step = Step(
                event.kind, event.name, attempt=event.attempt, digest=event.digest, code=event.code, settled=settled
            )
            return _with(run, event.step, step)
        case AttemptFailed():
            return _with(run, event.step, replace(run.steps[event.step], failed_attempt=True))
        case StepCompleted():
            known = run.steps[event.step]
            step = replace(known, status=event.status, content=event.content, error=event.error)
            reserved = {**run.reserved, (event.step, event.attempts): event.nanos} if event.nanos else run.reserved
            run = replace(_with(run, event.step, step), tokens=run.tokens + event.tokens, reserved=reserved)
            return _busy(run, event.duration_ms)
        case RunSuspended():
            suspension = Suspension(event.reason, event.step, event.name, event.text, event.at, event.arguments)
            return replace(run, suspended=suspension, waited_since=event.at)
        case StepSettled():
            return _settled(replace(run, suspended=None), event)
        case RunCompleted() | RunFailed():
            return replace(run, suspended=None, over=True)
        case _:
            assert_never(event)


def _busy(run: Run, ms: int) -> Run:
    """Adds the time of a step that has ended, without the time in which a call at the same time was made too."""
    longest = max(run.longest_ms, ms)
    others = any(step.status == "started" for step in run.steps.values())
    return replace(run, busy_ms=run.busy_ms + longest - run.longest_ms, longest_ms=longest if others else 0)


def _settled(run: Run, event: StepSettled) -> Run:
    match event.decision:
        case "approve" | "deny":
            return replace(run, decisions={**run.decisions, event.step: event.decision})
        case "retry":
            step = run.steps[event.step]
            again = replace(step, status="started", content=None, error=None, settled=step.settled + 1)
            return _with(run, event.step, again)
        case "answer":
            return run  # The step ends when a worker goes on with the run.
        case "skip":
            return _with(run, event.step, replace(run.steps[event.step], status="completed", content=event.content))
        case _:
            assert_never(event.decision)


def _with(run: Run, n: int, step: Step) -> Run:
    return replace(run, steps={**run.steps, n: step})


def messages_at(run: Run, step: int) -> int:
    """How many of its messages the run answers at step `step`."""
    return max([run.messages or 0, *(messages for taken, messages in run.taken.items() if taken <= step)])


def completed_in_a_row(state: Run) -> int:
    """How many of the first steps have ended in a row.

    A failed tool call counts, for the model has read its error. A failed model call at the end does not count: the
    fork makes it again.
    """
    n = 0
    while (step := state.steps.get(n + 1)) and step.status != "started":
        n += 1
    while n and state.steps[n].status == "failed" and state.steps[n].kind != "tool":
        n -= 1
    return n


def check(run: Run, step: int, kind: StepKind, name: str, digest: str = "", code: str = "") -> None:
    """Raises Mismatch, naming both steps, if the journal has another step at this place than the one to be made."""
    known, now = run.steps[step], Step(kind, name, digest=digest)
    if (known.kind, known.name) != (kind, name) or (known.digest and digest and known.digest != digest):
        raise Mismatch(
            f"step {step} is {known} in the journal{_by(known.code)}, and {now} now{_by(code)}: "
            "the run cannot go on with this version"
        )


def _by(code: str) -> str:
    return f" (version {code})" if code else ""
