"""The kernel against a plain model, under any order of appends, crashes, relays, repeats, rebalances and redrives.

The same examples each time. CLAW_MODEL_EXAMPLES=<how many> tries that many others instead.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from infra.bus.batch import Batches, Position
from infra.clock import uuid7
from infra.errors import Conflict
from infra.service.redrive import discard, request_redrive
from tests.faults.model import KEYS, Model
from tests.faults.world import PARTITIONS, Crash, Note, Record, World, bucket
from tests.machines import patient, run_machine

PAUSES = ("paused before publish", "paused before mark")


class Kernel(RuleBasedStateMachine):
    world: World

    @initialize()
    def begin(self) -> None:
        self.world.begin_again()
        self.model = Model(self.world.handler.refused)

    # Writing

    @rule(key=st.sampled_from(KEYS), refused=st.lists(st.sampled_from((False, False, True)), min_size=1, max_size=3))
    def append(self, key: str, refused: list[bool]) -> None:
        for refuse in refused:
            number = self.world.run(self.world.append(key))
            self._appended(key, number)
            if refuse:
                self.world.handler.refused.add(Note(key, number))

    @rule(key=st.sampled_from(KEYS))
    def append_twice_at_once(self, key: str) -> None:
        async def both() -> tuple[int, int]:
            return await asyncio.gather(self.world.append(key), self.world.append(key))

        for number in sorted(self.world.run(both())):
            self._appended(key, number)

    @rule(key=st.sampled_from(KEYS))
    def crash_before_commit(self, key: str) -> None:
        with pytest.raises(Crash):
            self.world.run(self.world.append(key, crashes=True))

    def _appended(self, key: str, number: int) -> None:
        self.model.written[key] += 1
        assert number == self.model.written[key]
        self.model.pending.add(Note(key, number))

    # Relaying

    @rule(
        n=st.integers(0, 1),
        fate=st.sampled_from(("", "", "", *PAUSES, "crashes", "is refused")),
        limit=st.integers(0, 4),
    )
    def relay(self, n: int, fate: str, limit: int) -> None:
        process = self.world.relays[n]
        if process.paused:
            return
        try:
            self.world.run(process.step(fate, limit))
        except Crash:
            self.world.relays[n] = self.world.new_relay()  # another owner; the leases of the dead one run on
        else:
            if not process.paused:
                self.model.pending -= set(process.taken[: limit if fate == "is refused" else None])

    @rule(key=st.sampled_from(KEYS), n=st.integers(0, 1), fate=st.sampled_from(PAUSES), limit=st.integers(0, 4))
    def overtake_relay(self, key: str, n: int, fate: str, limit: int) -> None:
        """One is paused for longer than its lease; the other takes over, gets `limit` messages out, and dies."""
        self.append(key, [False])
        self.time_passes()
        self.relay(n, fate, 0)
        self.time_passes()
        self.relay(1 - n, "crashes", limit)

    @rule(n=st.integers(0, 1))
    def wake_relay(self, n: int) -> None:
        process = self.world.relays[n]
        if not process.paused:
            return
        kept = self.world.leases_of(process.relay)
        self.world.run(process.wake())
        # It may mark its messages as published only in buckets that no other process has taken meanwhile.
        self.model.pending -= {note for note in process.taken if bucket(note.key) in kept}

    @rule(n=st.integers(0, 1))
    def kill_relay(self, n: int) -> None:
        self.world.run(self.world.relays[n].kill())
        self.world.relays[n] = self.world.new_relay()

    @rule()
    def time_passes(self) -> None:
        self.world.pass_time()

    @rule()
    def resend(self) -> None:
        self.world.resend()
        self.model.pending = self.model.notes

    @rule()
    def wipe_broker_and_resend(self) -> None:
        if any(process.paused for process in self.world.relays):
            return  # the messages that it took before the wipe would reach the new log before their predecessors
        self.world.resend()
        self.model.pending = self.model.notes
        self.world.broker.topic_id, self.world.broker.log = uuid7(), [[] for _ in range(PARTITIONS)]
        for p in range(PARTITIONS):
            self._rejoin(p, 0)
        self.model.positions = [0] * PARTITIONS

    # Consuming

    @rule(
        p=st.integers(0, PARTITIONS - 1),
        n=st.integers(0, 1),
        size=st.integers(1, 6),
        fate=st.sampled_from(("", "", "", "crashes", "loses its connection")),
        after=st.integers(1, 3),
    )
    def consume(self, p: int, n: int, size: int, fate: str, after: int) -> None:
        member, handler = self.world.members[p][n], self.world.handler
        current = Position(self.world.broker.topic_id, self.model.positions[p])
        begun = member.position
        handler.fate, handler.after = fate, after
        outcome = self.world.run(self.world.consume(member, p, size))
        handler.fate = ""
        records = self._catch_up(p)
        if outcome == "nothing to do":
            return
        assert (outcome == "fenced") == (begun != current), f"{outcome}, from {begun}, stored {current}"
        assert len(records) <= size
        assert not (outcome == "fenced" and records)
        if outcome == "done":
            assert member.position == Position(self.world.broker.topic_id, self.model.positions[p])
        if outcome == "crashed":
            self.world.members[p][n] = self.world.new_member(p)

    @rule(p=st.integers(0, PARTITIONS - 1), sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)))
    def both_members_at_once(self, p: int, sizes: tuple[int, int]) -> None:
        self._rejoin(p, 0)
        self._rejoin(p, 1)

        async def both() -> tuple[str, str]:
            first, second = self.world.members[p]
            return await asyncio.gather(self.world.consume(first, p, sizes[0]), self.world.consume(second, p, sizes[1]))

        outcomes = self.world.run(both())
        assert sorted(outcomes) in (["done", "fenced"], ["nothing to do", "nothing to do"])
        self._catch_up(p)

    @rule()
    def relay_and_consume_all(self) -> None:
        """The normal operation without faults."""
        for _ in range(2):  # the second round sends the messages that the first one had to leave to the other relay
            self.time_passes()
            for n in range(2):
                self.relay(n, "", 0)
        for p in range(PARTITIONS):
            self._rejoin(p, 0)
            self.consume(p, 0, 1_000_000, "", 0)

    @rule(p=st.integers(0, PARTITIONS - 1), n=st.integers(0, 1))
    def rebalance(self, p: int, n: int) -> None:
        """The other member is not told: it goes on with the position that it remembers."""
        self._rejoin(p, n)

    @rule(p=st.integers(0, PARTITIONS - 1), index=st.integers(0, 5))
    def broker_repeats_a_record(self, p: int, index: int) -> None:
        log = self.world.broker.log[p]
        if index < len(log):
            self.world.broker.append(log[index].key.decode(), log[index].value, log[index].headers)

    @rule(key=st.sampled_from(KEYS))
    def somebody_writes_garbage(self, key: str) -> None:
        headers = {"ce_id": str(uuid7()), "ce_type": "sample.v1.NoteTaken"}
        self.model.garbage += 1
        body = f"?{self.model.garbage}".encode()
        self.world.broker.append(key, body, [(name, value.encode()) for name, value in headers.items()])

    def _rejoin(self, p: int, n: int) -> Batches:
        self.world.members[p][n] = self.world.new_member(p)
        return self.world.members[p][n]

    def _catch_up(self, p: int) -> list[Record]:
        """The model reads all records before the stored position: position and effects are written together."""
        before, after = self.model.positions[p], self.world.position(p)
        records = self.world.broker.log[p][before:after]
        for record in records:
            self.model.read(record.note)
        self.model.positions[p] = after
        return records

    # Dead letters

    @rule(key=st.sampled_from(KEYS))
    def mend(self, key: str) -> None:
        self.world.handler.refused -= {note for note in self.world.handler.refused if note.key == key}

    @rule(key=st.sampled_from(KEYS), index=st.sampled_from((0, 0, 0, 1)))
    def redrive(self, key: str, index: int) -> None:
        letters = self.model.letters.get(key, [])
        if index >= len(letters):
            return
        note, state = letters[index]

        async def ask() -> None:
            async with self.world.ledger.begin() as tx:
                await request_redrive(tx, [id_], actor="test")

        id_ = self.world.letter_id(key, index)
        if state == "failed":
            self.world.run(ask())
            letters[index] = (note, "redriving")
        else:
            with pytest.raises(Conflict):
                self.world.run(ask())

    @rule(key=st.sampled_from(KEYS), index=st.integers(0, 2))
    def discard(self, key: str, index: int) -> None:
        letters = self.model.letters.get(key, [])
        if index >= len(letters):
            return

        async def ask() -> None:
            async with self.world.ledger.begin() as tx:
                await discard(tx, id_, actor="test")

        id_ = self.world.letter_id(key, index)
        if letters[index][1] == "redriving":
            with pytest.raises(Conflict):
                self.world.run(ask())
        else:
            self.world.run(ask())
            self.model.discarded.add(letters.pop(index)[0])

    @rule(steps=st.integers(1, 4), fate=st.sampled_from(("", "", "crashes", "loses its connection")))
    def drain(self, steps: int, fate: str) -> None:
        for _ in range(steps):
            self.world.handler.fate, self.world.handler.after = fate, 1
            outcome = self.world.run(self.world.drain())
            self.world.handler.fate = ""
            assert self.model.drain(stopped=bool(fate)) == (outcome != "done")

    # Conditions that hold at any time

    @invariant()
    def the_database_says_what_the_model_says(self) -> None:
        world, model = self.world, self.model
        versions = world.rows(
            world.desk, "SELECT stream_id, array_agg(version ORDER BY position) FROM event GROUP BY 1"
        )
        assert dict(versions) == {f"notebook:{k}": list(range(1, n + 1)) for k, n in model.written.items() if n}
        assert world.pending() == model.pending
        assert [world.position(p) for p in range(PARTITIONS)] == model.positions
        assert world.letters() == model.letters
        effects: dict[str, list[int]] = {key: [] for key in KEYS}
        for key, number in world.rows(world.ledger, "SELECT notebook, number FROM effect ORDER BY nth"):
            effects[key].append(number)
        assert effects == model.effects

        for key in KEYS:
            seen = self.world.broker.first_occurrences(key)
            assert seen == list(range(1, len(seen) + 1)), f"first occurrences of {key}: {seen}"
            assert self.model.effects[key] == sorted(set(self.model.effects[key])), f"effects of {key}"

    def teardown(self) -> None:
        """Everything wakes and is mended: then all that was written is in the log, and applied once, in order.

        All of it sent again changes nothing.
        """
        if sys.exception() is None:
            self._quiesce()
        for process in self.world.relays:
            self.world.run(process.kill())

    def _quiesce(self) -> None:
        world, model = self.world, self.model
        for n in range(2):
            self.wake_relay(n)
            self.the_database_says_what_the_model_says()
        self.relay_and_consume_all()
        assert model.pending == set()
        for key in KEYS:
            self.mend(key)
        while model.letters:
            for key, letters in list(model.letters.items()):
                if letters and letters[0][0].number < 0:
                    self.discard(key, 0)
                else:
                    self.redrive(key, 0)
                self.drain(1, "")
        self.the_database_says_what_the_model_says()
        self.resend()
        self.relay_and_consume_all()
        self.the_database_says_what_the_model_says()
        for key in KEYS:
            everything = range(1, model.written[key] + 1)
            assert world.broker.first_occurrences(key) == list(everything)
            assert model.effects[key] == [n for n in everything if Note(key, n) not in model.discarded]


@pytest.fixture
def world(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr("infra.bus.batch.PAUSE_SECONDS", (0, 0))
    world = World(database)
    yield world
    world.end()


@patient
def test_the_kernel_does_what_the_model_does(world: World) -> None:
    run_machine(Kernel, world, examples=25, steps=30)
