"""One session against a simple model, with messages, cancellations, decisions, crashes and lost lanes in any order.

The examples are the same each time. CLAW_MODEL_EXAMPLES=<number> tries that many random ones instead.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Literal, NamedTuple, cast, get_args
from uuid import UUID

import msgspec
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from infra.errors import Conflict
from infra.lanes.processor import MAX_RECOVERIES
from infra.postgres.tx import Tx
from protos.messages.agent import RunCompleted
from protos.messages.channel import SendMessage
from services.agent.definitions.queue_modes import QueueMode
from services.agent.lanes import RUNS, RunItem
from services.agent.runs.cancelling import cancel
from services.agent.runs.content import seal_result
from services.agent.runs.decisions import settle, suspension
from services.agent.runs.events import Decision
from services.agent.runs.notices import CANCELLED
from services.agent.runs.publishing import RUN
from services.agent.sessions.domain import Busy, Session, evolve
from services.agent.sessions.events import MessagesRequeued
from services.agent.sessions.publishing import SESSION as SESSIONS
from services.agent.sessions.requeue import let_fail
from tests.infra.lanes.lane_fixture import log_lines
from tests.machines import patient, run_machine
from tests.services.agent.execution.session_driver import DOUBT, LOOK, PERSON, SEND, Worker, World
from tests.services.agent.execution.session_model import OPEN, Model, check_reply, in_order

WORKERS = st.integers(0, 1)
MODES = st.sampled_from(("steer", "collect", "followup", "steer", "interrupt", "reject"))
# The model's behaviour for a message, one word for each time that it is asked; then it answers.
PLANS = st.sampled_from(("", "", LOOK, SEND, SEND, DOUBT, f"{LOOK} {SEND}", f"{SEND} {LOOK}", "flaky", "broken"))
# Chooses one of several stops.
INDEX = st.integers(0, 1)
MOVES = st.sampled_from((2, 0, 6, 4, 0, 8, 1, 5, 3, 7, 13))


class Turn(NamedTuple):
    """Worker `n` makes `moves` moves and then goes on to `place`. If there is nothing to do, a person writes first."""

    n: int
    moves: int
    place: str
    which: int
    mode: QueueMode
    plan: str


TURNS = st.builds(Turn, WORKERS, MOVES, st.sampled_from(("", "", "end", "model")), INDEX, MODES, PLANS)
FATES = ("dies", "overtaken", "overtaken midway", "hears")
Action = Literal["retry", "skip", "fail"]
ACTIONS = st.sampled_from(get_args(Action))


class Sessions(RuleBasedStateMachine):
    world: World

    @initialize(by_channel=st.booleans())
    def begin(self, by_channel: bool) -> None:
        self.world.begin_again()
        self.model = Model(self.world.tenant_id)
        self.session = Session()
        self.by_channel = by_channel
        self.labels: list[str] = []
        self.plans: dict[str, str] = {}
        self.items: dict[UUID, UUID] = {}
        [(self.read,)] = self.world.rows("SELECT coalesce(max(position), 0) FROM event")
        [(self.sent_before,)] = self.world.rows("SELECT coalesce(max(position), 0) FROM outbox")

    # Messages

    @rule(mode=MODES, plans=st.lists(PLANS, min_size=1, max_size=2), again=st.booleans(), turn=TURNS)
    def say(self, mode: QueueMode, plans: list[str], again: bool, turn: Turn) -> None:
        """again: a client that has not received the answer repeats its last message."""
        for plan in plans:
            self._say(mode, plan)
        self.world.set_mode(mode)
        if again and self.labels:
            answered = next(id_ for id_, run in self.model.runs.items() if self.labels[-1] in run.labels)
            assert self.world.run(self._send(self.labels[-1], self.plans[self.labels[-1]])) == answered
        self._work(turn)

    @rule(turn=TURNS, plan=PLANS)
    def steer_at_the_end(self, turn: Turn, plan: str) -> None:
        """A message joins a run that has already looked for new messages for the last time."""
        self._work(turn._replace(place="end"))
        self._say("steer", plan)

    def _say(self, mode: QueueMode, plan: str) -> None:
        self.world.set_mode(mode)
        model = self.model
        expected, busy = model.who_answers(mode), bool(model.in_status("queued", "running"))
        interrupted = model.in_status(*OPEN) if mode == "interrupt" else []
        label = self._label()
        try:
            run_id = self.world.run(self._send(label, plan))
        except Busy:
            assert mode == "reject"
            assert busy
            assert not self.by_channel
            self.labels.pop()
            return
        assert run_id == expected if expected else run_id not in model.runs
        for id_ in interrupted:
            model.runs[id_].cancelled = True
        run = model.accept(run_id, label, can_fail="broken" in plan)
        self._catch_up(None)
        assert (run.status == "refused") == (mode == "reject" and busy)

    @rule(mode=MODES.filter(lambda mode: mode != "interrupt"), turn=TURNS)
    def say_while_it_works(self, mode: QueueMode, turn: Turn) -> None:
        """Two transactions at the same time, in either order."""
        self._work(turn)
        worker = self.world.workers[turn.n]
        if not worker.gate.standing:
            return
        self.world.set_mode(mode)
        label = self._label()

        async def send() -> UUID | None:
            try:
                return await self._send(label, "")
            except Busy:
                return None

        async def both() -> UUID | None:
            run_id, _ = await asyncio.gather(send(), worker.move(turn.which))
            return run_id

        if run_id := self.world.run(both()):
            self.model.accept(run_id, label, can_fail=False)
        else:
            self.labels.pop()
        self._catch_up(worker.epoch)
        worker.calls = []

    def _label(self) -> str:
        self.labels.append(f"m{len(self.labels) + 1}")
        return self.labels[-1]

    async def _send(self, label: str, plan: str) -> UUID:
        self.plans[label] = plan
        return await self.world.say(f"{label} {plan}", by_channel=self.by_channel, key=label)

    # Decisions of people

    @rule(turn=TURNS, index=st.integers(0, 3), noticed=st.booleans())
    def cancel(self, turn: Turn, index: int, noticed: bool) -> None:
        """noticed: workers that are in a call look for cancellations at once."""
        self._work(turn)
        # The newest first.
        run_id = sorted(self.model.runs)[-1 - index % len(self.model.runs)]
        run = self.model.runs[run_id]
        if run.status in ("completed", "failed", "refused"):
            with pytest.raises(Conflict):
                self.world.ask(lambda tx: cancel(tx, run_id, CANCELLED))
        else:
            self.world.ask(lambda tx: cancel(tx, run_id, CANCELLED))
            run.cancelled = True
        self._catch_up(None)
        for worker in self.world.workers if noticed else ():
            self.world.run(worker.look())
            self._catch_up(worker.epoch)

    @rule(turn=TURNS, decision=st.sampled_from(("approve", "Yes!", "deny", "no")), action=ACTIONS)
    def decide(self, turn: Turn, decision: str, action: Action) -> None:
        """Decides everything that waits."""
        self._work(turn)
        self._decide(turn.mode, decision, action)

    def _decide(self, mode: QueueMode, decision: str, action: Action) -> None:
        for run_id in self.model.asking():
            if decision in ("approve", "deny"):
                self._settle(run_id, cast(Decision, decision))
            else:
                self.world.set_mode(mode)
                assert self.world.run(self.world.say(decision, by_channel=self.by_channel)) == run_id
                self.model.accepted.append((run_id, True))
                self._catch_up(None)
        for run_id in self.model.in_status("indeterminate"):
            if action == "fail":
                self._let_fail(run_id)
            else:
                self._settle(run_id, action)

    def _let_fail(self, run_id: UUID) -> None:
        async def work(tx: Tx) -> None:
            await let_fail(tx, run_id)

        self.model.runs[run_id].can_fail = True
        self.world.ask(work)
        self._catch_up(None)

    def _settle(self, run_id: UUID, decision: Decision) -> None:
        async def work(tx: Tx) -> None:
            step = (await suspension(tx, run_id)).step
            content = None
            if decision == "skip":
                content = await seal_result(tx, self.world.subjects, run_id, step, "skipped")
            await settle(tx, run_id, step, decision, PERSON, content)

        self.world.ask(work)
        self._catch_up(None)
        with pytest.raises(Conflict):
            self.world.ask(work)

    # Workers

    def _work(self, turn: Turn) -> None:
        if not self.model.in_status("queued", "running"):
            self._say(turn.mode, turn.plan)
        worker = self.world.workers[turn.n]
        if not worker.has_lane:
            self._claim(worker)
        self._move_on(worker, turn.moves, turn.which)
        while turn.place and worker.gate.standing and turn.place not in dict(worker.gate.standing):
            self._move_on(worker, 1, turn.which)

    @rule(turn=TURNS, fate=st.sampled_from(FATES), expires=st.booleans(), then=MOVES)
    def lose(self, turn: Turn, fate: str, expires: bool, then: int) -> None:
        """The worker dies, is told that it has lost its lane (expires: its lease runs out, too), or is overtaken."""
        worker, other = self.world.workers[turn.n], self.world.workers[1 - turn.n]
        if fate in ("overtaken", "overtaken midway"):
            self.world.run(other.die())
        self._work(turn)
        match fate:
            case "dies":
                self.world.run(worker.die())
            case "hears":
                self.world.run(worker.hear_of_loss())
                self._catch_up(worker.epoch)
            case _:
                self._overtake(worker, other, midway=fate == "overtaken midway")
                self._move_on(other, then, turn.which)
                self._move_on(worker, then, turn.which)
        if expires:
            self._leases_run_out()

    def _overtake(self, worker: Worker, other: Worker, *, midway: bool) -> None:
        """The other worker has the lane from now on, and this worker does not know it.

        midway: this worker has written in a transaction, and commits after the other one has claimed the lane.
        """
        worker.gate.midway = midway
        for _ in range(3 * midway):
            if not worker.gate.inside:
                self._move_on(worker, 1, 0)
        worker.gate.midway = False
        self._leases_run_out()
        self._claim(other)
        while worker.gate.inside:
            self._move_on(worker, 1, [place for place, _ in worker.gate.standing].index("midway"))

    def _leases_run_out(self) -> None:
        self.world.leases_run_out()
        self.model.ran_out = True

    def _claim(self, worker: Worker) -> None:
        if not self.model.in_status("queued", "running"):
            return
        self.world.pauses_are_over()
        held = self.world.rows("SELECT 1 FROM lane WHERE tenant_id = $1 AND owner IS NOT NULL", self.world.tenant_id)
        if self.world.run(worker.claim()):
            assert not held or self.model.ran_out, "claimed, and another one has it"
            assert worker.epoch > self.model.epoch
            self.model.epoch, self.model.ran_out = worker.epoch, False
            self.model.process_of[worker.epoch] = worker.process

    def _move_on(self, worker: Worker, moves: int, index: int) -> None:
        while worker.gate.standing and moves:
            self.world.run(worker.move(index))
            calls, worker.calls = worker.calls, []
            self.model.check_calls(calls, is_current=worker.epoch == self.model.epoch)
            self._catch_up(worker.epoch)
            moves -= 1

    def _catch_up(self, epoch: int | None) -> None:
        """The model reads the events that were stored meanwhile."""
        for position, stream, type_, version, data in self.world.rows(
            "SELECT position, stream_id, type, schema_version, data FROM event WHERE position > $1 ORDER BY position",
            self.read,
        ):
            kind, _, id_ = stream.partition(":")
            if kind == "run":
                self.model.add(UUID(id_), RUN.events.decode(type_, version, data), epoch)
            else:
                event = SESSIONS.events.decode(type_, version, data)
                self.session = evolve(self.session, event)
                if isinstance(event, MessagesRequeued):
                    labels = self.model.runs[event.failed_run_id].labels[-event.messages :]
                    can_fail = any("broken" in self.plans[label] for label in labels)
                    self.model.requeue(event.failed_run_id, event.run_id, event.messages, can_fail=can_fail)
            self.read = position

    # Invariants

    @invariant()
    def the_database_says_what_the_model_says(self) -> None:
        world, model, tenant = self.world, self.model, self.world.tenant_id
        rows = world.rows("SELECT id, status FROM run WHERE tenant_id = $1", tenant)
        assert dict(rows) == {id_: run.status for id_, run in model.runs.items()}
        assert len(model.in_status("running")) <= 1
        rows = world.rows("SELECT run_id, decides FROM message WHERE tenant_id = $1 ORDER BY seq", tenant)
        assert rows == model.accepted
        rows = world.rows("SELECT messages, run_id, run_messages, run_waits FROM session WHERE tenant_id = $1", tenant)
        for total, *last in rows:
            assert (total, Session(*last)) == (len(model.accepted), self.session)
        self._check_steps()
        self._check_lane()
        self._check_what_is_sent()

    def _check_steps(self) -> None:
        rows = self.world.rows(
            "SELECT run_id, n, kind, name, status, attempts FROM run_step WHERE tenant_id = $1", self.world.tenant_id
        )
        stored, folded = {(row[0], row[1]): row[2:] for row in rows}, self.model.steps()
        assert stored.keys() == folded.keys()
        for (id_, n), step in folded.items():
            # A step that a person wants made again is shown with its old state until it begins again.
            if not self.model.runs[id_].journal.steps[n].settled:
                assert stored[id_, n] == step
        # A tool takes effect once for each step, and once more only if a person decided so.
        steps_of: dict[str, set[tuple[UUID, int]]] = {}
        keys = {key: (id_, n) for id_ in self.model.runs for key, n in self.model.keys(id_).items()}
        for key, arguments in self.world.outside.keys.items():
            id_, n = keys[key]
            steps_of.setdefault(arguments, set()).add((id_, n))
            journal = self.model.runs[id_].journal
            assert journal.decisions.get(n) == ("approve" if journal.steps[n].name == SEND else None)
        assert all(len(found) == 1 for found in steps_of.values()), steps_of

    def _check_lane(self) -> None:
        """Items are done one after the other. Only runs that are to be executed have a waiting item."""
        rows = self.world.rows(
            "SELECT item_id, state, body, recoveries, finished_at FROM lane_item WHERE kind = $1 AND tenant_id = $2 "
            "ORDER BY seq",
            RUNS.name,
            self.world.tenant_id,
        )
        self.items |= {id_: msgspec.json.decode(body, type=RunItem).run_id for id_, _, body, *_ in rows if body}
        waiting = [self.items[id_] for id_, state, *_ in rows if state == "waiting"]
        assert sorted(waiting) == self.model.in_status("queued", "running")
        assert self.model.in_status("running") in ([], waiting[:1])
        assert in_order([at for _, state, *_, at in rows if state == "done"])
        assert all(recoveries >= MAX_RECOVERIES for _, state, _, recoveries, _ in rows if state == "dead")

    def _check_what_is_sent(self) -> None:
        rows = self.world.rows(
            "SELECT body, headers FROM outbox WHERE position > $1 AND (headers LIKE '%v1.RunCompleted%' "
            "OR headers LIKE '%v1.SendMessage%') ORDER BY position",
            self.sent_before,
        )
        completed = [
            msgspec.json.decode(body, type=RunCompleted) for body, headers in rows if "RunCompleted" in headers
        ]
        sends = [msgspec.json.decode(body, type=SendMessage) for body, headers in rows if "SendMessage" in headers]
        assert sorted(reply.run_id for reply in completed) == self.model.in_status("completed")
        for reply in completed:
            check_reply(reply.reply, self.model.runs[reply.run_id].labels, self.labels)
        assert [send.position for send in sends] == list(range(1, len(sends) + 1))
        replies = [(reply.run_id, reply.reply) for reply in completed]
        said = [(send.run_id, send.text) for send in sends]
        assert [pair for pair in said if pair in replies] == (replies if self.by_channel else [])
        # In the order of their messages, except the runs that have waited for a person.
        first = {run_id: n for n, (run_id, _) in reversed(list(enumerate(self.model.accepted)))}
        direct = [reply.run_id for reply in completed if self.model.runs[reply.run_id].never_waited]
        assert in_order([first[run_id] for run_id in direct])

    def teardown(self) -> None:
        """People decide everything, and a worker without faults finishes all runs."""
        if sys.exception() is None:
            self._work_off()
        for worker in self.world.workers:
            self.world.run(worker.die())

    def _work_off(self) -> None:
        for worker in self.world.workers:
            self.world.run(worker.die())
        self._leases_run_out()
        worker, open_ = self.world.workers[0], (*OPEN, "indeterminate")
        for n in range(4 * len(self.labels)):
            self._claim(worker)
            self._move_on(worker, -1, 0)
            self._decide("collect", ("deny", "approve")[n % 2], ("retry", "skip")[n % 2])
            if not self.model.in_status(*open_):
                break
        assert self.model.in_status(*open_) == []
        for run in self.model.runs.values():
            assert run.journal.over
            assert not run.cancelled or run.status == "cancelled" or run.given_up
        self.the_database_says_what_the_model_says()


@pytest.fixture
def world(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    # The test controls the look for cancellations and the end of pauses; time does not.
    monkeypatch.setattr("services.agent.execution.watch.POLL_SECONDS", 3600)
    monkeypatch.setattr("services.agent.sessions.domain.DEBOUNCE", timedelta(hours=1))
    # Otherwise, an item that several processes have lost waits for a second of real time.
    monkeypatch.setattr("infra.lanes.runner.BETWEEN_SUSPECTS_SECONDS", 0)
    with log_lines():
        world = World(database)
        yield world
        world.end()


@patient
def test_a_session_does_what_the_model_does(world: World) -> None:
    run_machine(Sessions, world, examples=15, steps=15)


def test_a_worker_that_resumes_a_run_takes_messages_between_two_drafts_at_the_same_steps(world: World) -> None:
    world.begin_again()
    world.set_mode("steer")
    worker = world.workers[0]

    def say(label: str) -> UUID:
        return world.run(world.say(label, by_channel=False))

    run_id = say("m1")
    world.run(worker.claim())
    while world.run(worker.move(0)) != "model":
        pass
    # The draft is to be stored together with the end of the run. The end is refused, because there is m2.
    assert [place for place, _ in worker.gate.standing] == ["end"]
    say("m2")
    world.run(worker.move(0))
    world.run(worker.move(0))
    # The worker has read m2, and is to begin the next step with it. That is refused, because there is m3.
    say("m3")
    while worker.gate.standing[0][0] != "model":
        world.run(worker.move(0))
    world.run(worker.die())
    world.leases_run_out()
    world.run(worker.claim())
    while worker.gate.standing:
        world.run(worker.move(0))
    assert world.rows("SELECT status, error FROM run WHERE id = $1", run_id) == [("completed", None)]
