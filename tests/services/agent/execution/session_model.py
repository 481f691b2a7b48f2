"""The promises of a session as a model in memory: its messages, the runs that answer them, and their events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, assert_never
from uuid import NAMESPACE_OID, UUID, uuid5

from infra.lanes.processor import MAX_RECOVERIES
from services.agent.definitions.queue_modes import QueueMode
from services.agent.runs.domain import (
    BeginStep,
    Command,
    Complete,
    EndStep,
    Fail,
    FailAttempt,
    Fork,
    Run,
    Settle,
    Start,
    Suspend,
    TakeMessages,
    decide,
    evolve,
)
from services.agent.runs.events import (
    AttemptFailed,
    Event,
    MessagesTaken,
    RunCompleted,
    RunFailed,
    RunForked,
    RunStarted,
    RunSuspended,
    StepCompleted,
    StepSettled,
    StepStarted,
)
from services.agent.sessions.domain import CAP
from tests.services.agent.execution.session_driver import Call

GIVEN_UP = f"InvalidMessage: item: its process died, or lost it, {MAX_RECOVERIES} times"
OPEN = ("queued", "running", "waiting")


@dataclass
class RunModel:
    """The expected state of a run, from the accepted messages and the stored events.

    can_fail: one of its messages or an operator asks for it. given_up: too many workers have lost it. never_waited: it
    did not wait for a person, so it answers in the order of its first message. began_at: step → the epoch under which
    its last attempt began.
    """

    status: str = "queued"
    journal: Run = field(default_factory=Run)
    labels: list[str] = field(default_factory=list)
    cancelled: bool = False
    can_fail: bool = False
    given_up: bool = False
    never_waited: bool = True
    began_at: dict[int, int] = field(default_factory=dict)


class Model:
    """One session. epoch: of the last claim of its lane; ran_out: whether that one's lease has run out."""

    def __init__(self, tenant_id: str) -> None:
        self.runs: dict[UUID, RunModel] = {}
        # In the order of acceptance: the run, and whether the message was only a yes or a no.
        self.accepted: list[tuple[UUID, bool]] = []
        self.last: UUID | None = None
        self.epoch = 0
        self.ran_out = False
        # Epoch → the process that claimed the lane with it.
        self.process_of: dict[int | None, int] = {}
        self._tenant_id = tenant_id
        self._executed: UUID | None = None

    def in_status(self, *statuses: str) -> list[UUID]:
        """Ordered by id."""
        return sorted(id_ for id_, run in self.runs.items() if run.status in statuses)

    def asking(self) -> list[UUID]:
        """The runs that wait for an approval. A yes or no goes to the first one: it has asked last."""
        asked = [(run.journal.suspended.at, id_) for id_, run in self.runs.items() if run.journal.suspended]
        return [id_ for _, id_ in sorted(asked, reverse=True) if self.runs[id_].status == "waiting"]

    def who_answers(self, mode: QueueMode) -> UUID | None:
        """The run that a message joins, if it is not a yes or no; None: a run of its own."""
        last = self.runs[self.last] if self.last else None
        if last is None or last.cancelled:
            return None
        collects = mode in ("collect", "steer") and last.status == "queued" and len(last.labels) < CAP
        steers = mode == "steer" and last.status in ("running", "waiting")
        return self.last if collects or steers else None

    def accept(self, run_id: UUID, label: str, *, can_fail: bool) -> RunModel:
        """A message was accepted and that run is to answer it."""
        if run_id not in self.runs:
            self.last = run_id
        run = self.runs.setdefault(run_id, RunModel())
        run.labels.append(label)
        run.can_fail |= can_fail
        self.accepted.append((run_id, False))
        return run

    def requeue(self, failed: UUID, new: UUID, count: int, *, can_fail: bool) -> None:
        """A run failed, and another one answers its last `count` messages."""
        labels = self.runs[failed].labels
        # A message that was sent at the same time may have joined it.
        joined_later = self.runs.get(new, RunModel())
        # It is queued behind runs of later messages, so its turn is not that of its first message.
        self.runs[new] = RunModel(
            labels=labels[-count:] + joined_later.labels,
            can_fail=can_fail or joined_later.can_fail,
            never_waited=False,
        )
        del labels[-count:]
        joined = [n for n, entry in enumerate(self.accepted) if entry == (failed, False)][-count:]
        for n in joined:
            self.accepted[n] = (new, False)
        self.last = new

    # Facts

    def add(self, run_id: UUID, event: Event, epoch: int | None) -> None:
        """An event was stored. epoch: of the lease of the worker that moved; None: no worker moved."""
        run = self.runs.setdefault(run_id, RunModel())
        before = run.journal
        assert list(decide(_command(event), before)) == [event], f"the rules do not allow {event} after {before}"
        run.journal = evolve(before, event)
        if not _is_of_people(event, epoch):
            assert epoch == self.epoch, f"{event} under epoch {epoch}, and the lane is at {self.epoch}"
            self._take_turn(run_id, event)
        match event:
            case RunStarted():
                run.status = "running"
            case StepStarted():
                assert not run.cancelled, f"begun after the cancel: {event}"
                run.began_at[event.step] = self.epoch
            case StepCompleted():
                assert event.attempts == before.steps[event.step].attempt
                # Under a later epoch only by the process that made the call: it has kept the result.
                began = run.began_at[event.step]
                assert began == epoch or self.process_of[began] == self.process_of[epoch], f"ended by another: {event}"
            case RunSuspended():
                run.status = "indeterminate" if event.reason == "indeterminate" else "waiting"
                run.never_waited = False
            case StepSettled():
                run.status = "queued"
            case RunCompleted():
                run.status = "completed"
            case RunFailed():
                run.status = event.status
                assert event.status != "cancelled" or run.cancelled, event
                run.given_up = event.error == GIVEN_UP
                assert event.status != "failed" or run.can_fail or run.given_up, event
            case MessagesTaken() | AttemptFailed():
                pass
            case RunForked():
                raise AssertionError(event)
            case _:
                assert_never(event)
        if run.status != "running" and self._executed == run_id:
            self._executed = None

    def _take_turn(self, run_id: UUID, event: Event) -> None:
        """From a run's start until it ends or waits, no event is written for another run of the session."""
        # A run that is cancelled before its start ends without one.
        may_be_first = isinstance(event, (RunStarted, RunFailed))
        assert self._executed == run_id or (may_be_first and self._executed is None), (
            f"{event} of {run_id}, and {self._executed} is executed"
        )
        self._executed = run_id

    def check_calls(self, calls: Sequence[Call], *, is_current: bool) -> None:
        """Only begun steps make calls. A worker that has lost its lane does not know the progress of the other one."""
        for run_id, key in calls:
            journal = self.runs[run_id].journal
            kind = "tool" if key else "model"
            begun = [n for n, step in journal.steps.items() if (step.kind, step.status) == (kind, "started")]
            assert begun or not is_current, f"a {kind} is called, and the journal has no such step begun: {journal}"
            if key:
                assert key in self.keys(run_id), f"no step of {run_id} has the key {key}"
            if key and is_current:
                assert self.keys(run_id)[key] in begun, f"a step that was made is made again: {journal}"

    def keys(self, run_id: UUID) -> dict[str, int]:
        """Idempotency key → step, for each call of a tool. Only a retry that a person decided has another key."""
        return {
            str(uuid5(NAMESPACE_OID, f"agent/{self._tenant_id}/{run_id}/{n}" + (f"/{again}" if again else ""))): n
            for n, step in self.runs[run_id].journal.steps.items()
            if step.kind == "tool"
            for again in range(step.settled + 1)
        }

    def steps(self) -> dict[tuple[UUID, int], tuple[str, str, str, int]]:
        """Kind, name, status and attempts of each step."""
        names = {"started": "running"}
        return {
            (id_, n): (step.kind, step.name, names.get(step.status, step.status), step.attempt)
            for id_, run in self.runs.items()
            for n, step in run.journal.steps.items()
        }


def _is_of_people(event: Event, epoch: int | None) -> bool:
    """True if the event comes from a message, a cancellation or a decision."""
    if isinstance(event, RunFailed):
        return epoch is None or event.status == "refused"
    return isinstance(event, StepSettled)


def _command(event: Event) -> Command:
    """The command that leads to this event."""
    key = event.session_key
    match event:
        case RunStarted():
            assert event.messages is not None
            return Start(key, event.agent_id, event.agent_version, event.at, event.messages)
        case RunForked():
            return Fork(key, event.origin, event.messages, event.agent_version)
        case MessagesTaken():
            return TakeMessages(key, event.step, event.messages)
        case StepStarted():
            return BeginStep(key, event.step, event.kind, event.name, event.attempt, event.digest, event.code)
        case AttemptFailed():
            return FailAttempt(key, event.step, event.attempt, event.error)
        case StepCompleted():
            return EndStep(
                key,
                event.step,
                event.attempts,
                event.duration_ms,
                event.content,
                event.error,
                event.tokens,
                event.nanos,
            )
        case RunSuspended():
            return Suspend(key, event.reason, event.step, event.name, event.text, event.arguments, event.at)
        case StepSettled():
            return Settle(key, event.step, event.decision, event.by, event.content)
        case RunCompleted():
            return Complete(key, event.reply)
        case RunFailed():
            return Fail(key, event.status, event.error)
        case _:
            assert_never(event)


def check_reply(reply: str, own: Sequence[str], all_labels: Sequence[str]) -> None:
    """The reply answers all messages of the run in their order, and its history has only earlier messages."""
    told = reply.split()
    before, answered = told[: -len(own)], told[-len(own) :]
    assert answered == list(own), f"{reply} to {own}"
    order = {label: n for n, label in enumerate(all_labels)}
    assert all(order[label] < order[own[0]] for label in before), f"{reply} to {own}"
    assert len(set(told)) == len(told), reply


def in_order(values: Sequence[Any]) -> bool:
    return list(values) == sorted(values)
