"""The events that may follow in a run's journal."""

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
    Fork,
    Mismatch,
    NotWaiting,
    Run,
    Settle,
    Start,
    Suspend,
    TakeMessages,
    check,
    decide,
    evolve,
    messages_at,
)
from services.agent.runs.events import (
    Decision,
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
from services.agent.runs.limits import Limits, exceeded, remaining

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


def started(n: int = 1, attempt: int = 1, at: datetime = NOON, version: int = 3, messages: int = 1) -> RunStarted:
    return RunStarted(
        n=n, session_key="s", agent_id=AGENT, agent_version=version, attempt=attempt, at=at, messages=messages
    )


def begun(
    n: int, step: int = 1, attempt: int = 1, kind: StepKind = "model", name: str = "m", digest: str = "", code: str = ""
) -> StepStarted:
    return StepStarted(n=n, session_key="s", step=step, kind=kind, name=name, attempt=attempt, digest=digest, code=code)


def suspended(n: int, reason: Reason = "approval", step: int = 2, at: datetime = NOON) -> RunSuspended:
    return RunSuspended(n=n, session_key="s", reason=reason, step=step, name="t", text="why", at=at, arguments=b"a")


def settled(n: int, decision: Decision, step: int = 2, content: bytes | None = None) -> StepSettled:
    return StepSettled(n=n, session_key="s", step=step, decision=decision, by="me", content=content)


def ended(
    n: int, step: int = 1, attempts: int = 1, content: bytes | None = b"x", tokens: int = 0, ms: int = 5
) -> StepCompleted:
    return StepCompleted(
        n=n,
        session_key="s",
        step=step,
        kind="model",
        name="m",
        status="completed" if content else "failed",
        attempts=attempts,
        duration_ms=ms,
        content=content,
        error=None if content else "no",
        tokens=tokens,
    )


def test_facts_are_counted_from_one() -> None:
    assert given().when(Start("s", AGENT, 3, NOON, 1)) == [started()]
    assert given(started()).when(BeginStep("s", 1, "model", "m", 1)) == [begun(2)]
    assert given(started(), begun(2)).when(EndStep("s", 1, 1, 5, b"x")) == [ended(3)]
    assert given(started(), begun(2), ended(3)).when(Complete("s", b"r")) == [
        RunCompleted(n=4, session_key="s", reply=b"r")
    ]


def test_a_run_that_is_taken_over_keeps_its_agents_version_and_its_time() -> None:
    taken_over = given(started(), begun(2)).when(Start("s", AGENT, 7, NOON + timedelta(seconds=40), 9))
    assert taken_over == [started(3, attempt=2, at=NOON + timedelta(seconds=40), version=3)]
    run = given(started(), begun(2), *taken_over).run
    assert remaining(run, Limits(seconds=60), NOON + timedelta(seconds=50)) == 10


def test_a_step_that_did_not_end_is_begun_again() -> None:
    again = given(started(), begun(2)).when(BeginStep("s", 1, "model", "m", 2))
    assert again == [begun(3, attempt=2)]
    run = given(started(), begun(2), *again, ended(4, attempts=2)).run
    assert [step.status for step in run.steps.values()] == ["completed"]


@pytest.mark.parametrize("content", [b"x", None])
def test_a_step_that_has_ended_is_never_made_again(content: bytes | None) -> None:
    over = given(started(), begun(2), ended(3, content=content))
    with pytest.raises(Mismatch, match="must not begin again"):
        over.when(BeginStep("s", 1, "model", "m", 2))
    with pytest.raises(Mismatch, match="cannot end again"):
        over.when(EndStep("s", 1, 1, 5, b"y"))


def test_a_step_is_what_it_was_in_the_journal() -> None:
    one = given(started(), begun(2, digest="aa", code="1.0"))
    with pytest.raises(Mismatch, match=r"step 1 is model 'm' of aa in the journal \(version 1.0\), and tool 't' now:"):
        one.when(BeginStep("s", 1, "tool", "t", 1))
    with pytest.raises(Mismatch, match=r"model 'm' of aa in .* and model 'm' of bb now \(version 2.0\)"):
        one.when(BeginStep("s", 1, "model", "m", 1, "bb", "2.0"))
    with pytest.raises(Mismatch, match="step 2 has not begun and cannot end"):
        one.when(EndStep("s", 2, 1, 5, b"x"))
    check(one.run, 1, "model", "m", "aa", "2.0")
    # Older journals have no digest.
    check(given(started(), begun(2)).run, 1, "model", "m", "aa", "2.0")


def test_steps_that_are_made_together_begin_and_end_in_any_order() -> None:
    run = given(started(), begun(2), ended(3), begun(4, 3), begun(5, 2), ended(6, 2), ended(7, 3)).run
    assert {n: step.status for n, step in run.steps.items()} == {1: "completed", 2: "completed", 3: "completed"}


def test_messages_are_taken_at_a_step_and_stay_there() -> None:
    assert given(started()).when(TakeMessages("s", 2, 1)) == []
    taken = given(started()).when(TakeMessages("s", 2, 3))
    assert taken == [MessagesTaken(n=2, session_key="s", step=2, messages=3)]
    run = given(started(), *taken, MessagesTaken(n=3, session_key="s", step=4, messages=4)).run
    assert [messages_at(run, step) for step in range(6)] == [1, 1, 3, 3, 4, 4]
    # Who takes the run over has the messages that it began with, not those that it has now.
    assert given(started(), *taken).when(Start("s", AGENT, 3, NOON, 3)) == [started(3, attempt=2)]


@pytest.mark.parametrize(
    ("reason", "decision", "fits"),
    [
        ("approval", "approve", True),
        ("approval", "deny", True),
        ("approval", "retry", False),
        ("approval", "skip", False),
        ("indeterminate", "retry", True),
        ("indeterminate", "skip", True),
        ("indeterminate", "approve", False),
    ],
)
def test_a_person_decides_only_what_was_asked(reason: Reason, decision: Decision, fits: bool) -> None:
    waits = given(started(), begun(2), ended(3), begun(4, 2), ended(5, 2), suspended(6, reason))
    command = Settle("s", 2, decision, "me", b"c")
    if fits:
        assert waits.when(command) == [settled(7, decision, content=b"c")]
        with pytest.raises(NotWaiting):
            given(
                started(), begun(2), ended(3), begun(4, 2), ended(5, 2), suspended(6, reason), settled(7, decision)
            ).when(command)
    else:
        with pytest.raises(NotWaiting):
            waits.when(command)
    with pytest.raises(NotWaiting):
        waits.when(Settle("s", 3, decision, "me"))


def test_a_decision_is_found_at_its_step() -> None:
    asked = given(started(), begun(2), ended(3)).when(Suspend("s", "approval", 2, "t", "why", b"a", NOON))
    assert asked == [suspended(4)]
    run = given(started(), begun(2), ended(3), *asked, settled(5, "deny")).run
    assert (run.decisions, run.suspended) == ({2: "deny"}, None)


def test_an_uncertain_step_is_made_again_or_has_the_result_that_was_given() -> None:
    history = started(), begun(2), ended(3), begun(4, 2), ended(5, 2), suspended(6, "indeterminate")
    again = given(*history, settled(7, "retry")).run.steps[2]
    assert (again.status, again.content, again.settled) == ("started", None, 1)
    made = given(*history, settled(7, "retry"), begun(8, 2)).run.steps[2]
    assert made.settled == 1
    skipped = given(*history, settled(7, "skip", content=b"given")).run.steps[2]
    assert (skipped.status, skipped.content) == ("completed", b"given")


def test_the_time_in_which_a_run_waits_for_a_person_is_not_its_own() -> None:
    later = NOON + timedelta(days=3)
    run = given(
        started(),
        suspended(2, at=NOON + timedelta(seconds=10)),
        settled(3, "approve"),
        started(4, attempt=2, at=later),
    ).run
    assert remaining(run, Limits(seconds=60), later) == 50


@pytest.mark.parametrize(
    "end", [RunCompleted(n=2, session_key="s", reply=b"r"), RunFailed(n=2, session_key="s", status="failed", error="e")]
)
def test_after_the_end_nothing_more_is_written(end: Event) -> None:
    over = given(started(), end)
    for command in (
        Start("s", AGENT, 1, NOON, 1),
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
    assert exceeded(run, Limits(steps=2, seconds=11, tokens=91), 2, later) is None
    assert exceeded(run, Limits(steps=1), 2, later) == "the limit of 1 steps is reached"
    assert exceeded(run, Limits(tokens=90), 2, later) == "the limit of 90 tokens is reached"
    assert exceeded(run, Limits(seconds=10), 2, later) == "the limit of 10 seconds is reached"


def test_a_fork_has_the_messages_and_the_agent_of_its_origin() -> None:
    forked = given().when(Fork("s", UUID(int=9), 2, 5))
    assert forked == [RunForked(n=1, session_key="s", origin=UUID(int=9), messages=2, agent_version=5)]
    assert given(*forked).when(Start("s", AGENT, 7, NOON, 4)) == [started(2, version=5, messages=2)]


def test_the_time_of_the_steps_counts_and_calls_at_the_same_time_count_once() -> None:
    assert given(started(), begun(2), ended(3, ms=7), begun(4, 2), ended(5, 2, ms=4)).run.busy_ms == 11
    together = (started(), begun(2), begun(3, 2), begun(4, 3), ended(5, 2, ms=3), ended(6, 1, ms=9))
    assert given(*together).run.busy_ms == 9
    assert given(*together, ended(7, 3, ms=6), begun(8, 4), ended(9, 4, ms=2)).run.busy_ms == 11
    # Waiting for a person or another worker is not work.
    later = NOON + timedelta(hours=2)
    run = given(started(), begun(2), ended(3), suspended(4), settled(5, "approve"), started(6, 2, later)).run
    assert run.busy_ms == 5
