"""A run: pure. What may be written into its journal, and when it has had enough."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal, assert_never
from uuid import UUID

import msgspec

from services.agent.runs.events import (
    Ending,
    Event,
    RunCompleted,
    RunFailed,
    RunStarted,
    StepCompleted,
    StepKind,
    StepStarted,
)


class Limits(msgspec.Struct, frozen=True):
    """What one run may take at most. seconds: from its first start. tokens: input and output of all model calls."""

    steps: int = 20
    seconds: int = 300
    tokens: int | None = None


@dataclass(frozen=True)
class Step:
    """A step as the journal has it. content: sealed."""

    kind: StepKind
    name: str
    status: Literal["started", "completed", "failed"] = "started"
    content: bytes | None = None
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """A run's state. `n`: facts so far. `steps`: the first one first."""

    n: int = 0
    started_at: datetime | None = None
    agent_version: int | None = None
    attempts: int = 0
    tokens: int = 0
    steps: tuple[Step, ...] = ()
    over: bool = False


@dataclass(frozen=True)
class Start:
    session_key: str
    agent_id: UUID
    agent_version: int
    at: datetime


@dataclass(frozen=True)
class BeginStep:
    session_key: str
    step: int
    kind: StepKind
    name: str
    attempt: int


@dataclass(frozen=True)
class EndStep:
    session_key: str
    step: int
    attempts: int
    duration_ms: int
    content: bytes | None = None
    error: str | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Complete:
    session_key: str
    reply: bytes


@dataclass(frozen=True)
class Fail:
    session_key: str
    status: Ending
    error: str


Command = Start | BeginStep | EndStep | Complete | Fail


class Mismatch(Exception):
    """The journal tells of another step than the code would now make: going on would be a guess."""


def decide(command: Command, run: Run) -> list[Event]:
    """Raises Mismatch where the command contradicts the journal. Of a run that is over nothing more is written."""
    if run.over:
        return []
    n = run.n + 1
    match command:
        case Start(key, agent_id, version, at):
            attempt = run.attempts + 1
            version = run.agent_version or version
            return [RunStarted(n=n, session_key=key, agent_id=agent_id, agent_version=version, attempt=attempt, at=at)]
        case BeginStep(key, step, kind, name, attempt):
            if step > len(run.steps) + 1:
                raise Mismatch(f"step {step} would follow step {len(run.steps)}")
            if step <= len(run.steps):
                check(run, step, kind, name)
                if run.steps[step - 1].status != "started":
                    raise Mismatch(f"step {step} is {run.steps[step - 1].status} and would be made again")
            return [StepStarted(n=n, session_key=key, step=step, kind=kind, name=name, attempt=attempt)]
        case EndStep():
            return _end_step(command, run)
        case Complete(key, reply):
            return [RunCompleted(n=n, session_key=key, reply=reply)]
        case Fail(key, status, error):
            return [RunFailed(n=n, session_key=key, status=status, error=error)]
        case _:
            assert_never(command)


def _end_step(command: EndStep, run: Run) -> list[Event]:
    if command.step != len(run.steps):
        raise Mismatch(f"step {command.step} ends, and the last one begun is {len(run.steps)}")
    step = run.steps[-1]
    if step.status != "started":
        raise Mismatch(f"step {command.step} is {step.status} and would end again")
    return [
        StepCompleted(
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
        )
    ]


def evolve(run: Run, event: Event) -> Run:
    run = replace(run, n=event.n)
    match event:
        case RunStarted():
            return replace(
                run,
                attempts=event.attempt,
                agent_version=event.agent_version,
                started_at=run.started_at or event.at,
            )
        case StepStarted():
            return replace(run, steps=(*run.steps[: event.step - 1], Step(event.kind, event.name)))
        case StepCompleted():
            step = Step(event.kind, event.name, event.status, event.content, event.error)
            return replace(run, steps=(*run.steps[:-1], step), tokens=run.tokens + event.tokens)
        case RunCompleted() | RunFailed():
            return replace(run, over=True)
        case _:
            assert_never(event)


def check(run: Run, step: int, kind: StepKind, name: str) -> None:
    """Raises Mismatch where the journal has another kind or name for this step."""
    known = run.steps[step - 1]
    if (known.kind, known.name) != (kind, name):
        raise Mismatch(f"step {step} is {known.kind} {known.name!r} in the journal, and {kind} {name!r} now")


def exceeded(run: Run, limits: Limits, now: datetime) -> str | None:
    """Which limit forbids another step; None: there may be one."""
    if len(run.steps) >= limits.steps:
        return f"the limit of {limits.steps} steps is reached"
    if limits.tokens is not None and run.tokens >= limits.tokens:
        return f"the limit of {limits.tokens} tokens is reached"
    if remaining(run, limits, now) <= 0:
        return f"the limit of {limits.seconds} seconds is reached"
    return None


def remaining(run: Run, limits: Limits, now: datetime) -> float:
    """Seconds that are left of the run's time."""
    assert run.started_at is not None
    return (run.started_at + timedelta(seconds=limits.seconds) - now).total_seconds()
