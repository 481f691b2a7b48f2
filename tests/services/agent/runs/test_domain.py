"""What may be written into a run's journal."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from services.agent.runs.domain import (
    BeginStep,
    Command,
    Complete,
    EndStep,
    Fail,
    Limits,
    Mismatch,
    Run,
    Start,
    check,
    decide,
    evolve,
    exceeded,
    remaining,
)
from services.agent.runs.events import Event, RunCompleted, RunFailed, RunStarted, StepCompleted, StepKind, StepStarted

AGENT = UUID(int=1)
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@dataclass(frozen=True)
class Given:
    run: Run

    def when(self, command: Command) -> list[Event]:
        return decide(command, self.run)


def given(*events: Event) -> Given:
    run = Run()
    for event in events:
        run = evolve(run, event)
    return Given(run)


def started(n: int = 1, attempt: int = 1, at: datetime = NOON, version: int = 3) -> RunStarted:
    return RunStarted(n=n, session_key="s", agent_id=AGENT, agent_version=version, attempt=attempt, at=at)


def begun(n: int, step: int = 1, attempt: int = 1, kind: StepKind = "model", name: str = "m") -> StepStarted:
    return StepStarted(n=n, session_key="s", step=step, kind=kind, name=name, attempt=attempt)


def ended(n: int, step: int = 1, attempts: int = 1, content: bytes | None = b"x", tokens: int = 0) -> StepCompleted:
    return StepCompleted(
        n=n,
        session_key="s",
        step=step,
        kind="model",
        name="m",
        status="completed" if content else "failed",
        attempts=attempts,
        duration_ms=5,
        content=content,
        error=None if content else "no",
        tokens=tokens,
    )


def test_facts_are_counted_from_one() -> None:
    assert given().when(Start("s", AGENT, 3, NOON)) == [started()]
    assert given(started()).when(BeginStep("s", 1, "model", "m", 1)) == [begun(2)]
    assert given(started(), begun(2)).when(EndStep("s", 1, 1, 5, b"x")) == [ended(3)]
    assert given(started(), begun(2), ended(3)).when(Complete("s", b"r")) == [
        RunCompleted(n=4, session_key="s", reply=b"r")
    ]


def test_a_run_that_is_taken_over_keeps_its_agents_version_and_its_time() -> None:
    taken_over = given(started(), begun(2)).when(Start("s", AGENT, 7, NOON + timedelta(seconds=40)))
    assert taken_over == [started(3, attempt=2, at=NOON + timedelta(seconds=40), version=3)]
    run = given(started(), begun(2), *taken_over).run
    assert remaining(run, Limits(seconds=60), NOON + timedelta(seconds=50)) == 10


def test_a_step_that_did_not_end_is_begun_again() -> None:
    again = given(started(), begun(2)).when(BeginStep("s", 1, "model", "m", 2))
    assert again == [begun(3, attempt=2)]
    run = given(started(), begun(2), *again, ended(4, attempts=2)).run
    assert [step.status for step in run.steps] == ["completed"]


@pytest.mark.parametrize("content", [b"x", None])
def test_a_step_that_has_ended_is_never_made_again(content: bytes | None) -> None:
    over = given(started(), begun(2), ended(3, content=content))
    with pytest.raises(Mismatch, match="would be made again"):
        over.when(BeginStep("s", 1, "model", "m", 2))
    with pytest.raises(Mismatch, match="would end again"):
        over.when(EndStep("s", 1, 1, 5, b"y"))


def test_steps_leave_no_gap_and_keep_their_kind_and_name() -> None:
    one = given(started(), begun(2))
    with pytest.raises(Mismatch, match="step 3 would follow step 1"):
        one.when(BeginStep("s", 3, "tool", "t", 1))
    with pytest.raises(Mismatch, match=r"step 1 is model 'm' in the journal, and tool 't' now"):
        one.when(BeginStep("s", 1, "tool", "t", 1))
    with pytest.raises(Mismatch, match="step 2 ends, and the last one begun is 1"):
        one.when(EndStep("s", 2, 1, 5, b"x"))
    check(one.run, 1, "model", "m")


@pytest.mark.parametrize(
    "end", [RunCompleted(n=2, session_key="s", reply=b"r"), RunFailed(n=2, session_key="s", status="failed", error="e")]
)
def test_after_the_end_nothing_more_is_written(end: Event) -> None:
    over = given(started(), end)
    for command in (
        Start("s", AGENT, 1, NOON),
        BeginStep("s", 1, "model", "m", 1),
        EndStep("s", 1, 1, 5, b"x"),
        Complete("s", b"r"),
        Fail("s", "cancelled", "c"),
    ):
        assert over.when(command) == []


def test_a_run_that_never_began_can_fail() -> None:
    failed = RunFailed(n=1, session_key="s", status="refused", error="e")
    assert given().when(Fail("s", "refused", "e")) == [failed]


def test_limits_are_said_when_they_are_reached() -> None:
    run = given(started(), begun(2), ended(3, tokens=90)).run
    later = NOON + timedelta(seconds=10)
    assert exceeded(run, Limits(steps=2, seconds=11, tokens=91), later) is None
    assert exceeded(run, Limits(steps=1), later) == "the limit of 1 steps is reached"
    assert exceeded(run, Limits(tokens=90), later) == "the limit of 90 tokens is reached"
    assert exceeded(run, Limits(seconds=10), later) == "the limit of 10 seconds is reached"
