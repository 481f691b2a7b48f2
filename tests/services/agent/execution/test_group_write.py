"""The group write on a real database: each refused write leaves nothing behind, and the others are written."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from infra.clock import utcnow, uuid7
from infra.errors import Conflict
from infra.lanes.claims import LaneLost
from infra.postgres.lane_items import AT_ONCE
from infra.postgres.outbox_rows import OutboxRow
from services.agent.execution.group_write import Begun, EndedStep, GroupWriter, MessagesArrived, RunStopped
from services.agent.lanes import RUNS, RunItem
from services.agent.models.contract import Usage
from tests.services.agent.execution.written_runs import SAY, TENANT, WEEK, Runs, used, written_runs

# Every row that a write of the run $1 can make or change.
_ALL_OF = """
SELECT to_jsonb(r), (SELECT to_jsonb(l) FROM lane l WHERE l.lane = r.session_key),
    (SELECT array_agg(to_jsonb(i)) FROM lane_item i WHERE i.item_id = r.id),
    (SELECT version FROM stream WHERE stream_id = 'run:' || r.id),
    (SELECT count(*) FROM event WHERE stream_id = 'run:' || r.id),
    (SELECT array_agg(to_jsonb(s)) FROM run_step s WHERE s.run_id = r.id),
    (SELECT count(*) FROM run_usage u WHERE u.run_id = r.id),
    (SELECT count(*) FROM delivery d WHERE d.run_id = r.id),
    (SELECT count(*) FROM outbox o WHERE o.key = r.id::text),
    (SELECT last FROM sequence q WHERE q.name = 'sent' AND q.key = r.session_key)
FROM run r
WHERE r.id = $1
"""


@pytest.fixture
async def runs(database: str) -> AsyncIterator[Runs]:
    async with written_runs(database) as found:
        yield found


async def test_writes_of_one_run_in_one_group_follow_each_other(runs: Runs) -> None:
    run_id, lease = await runs.queued()
    first = runs.write(run_id, lease, begins=True)
    first.started_model = "m"
    second = runs.write(run_id, lease, version=1, events=2, begins=True, expected_messages=1)
    second.begun.append(Begun(1, "model", "m", 1, "span"))
    third = runs.write(run_id, lease, version=3)
    third.ended.append(EndedStep(1, "completed", 7, None))
    assert await runs.commit(first, second, third) == [None, None, None]
    assert await runs.versions(run_id) == [1, 2, 3, 4]
    assert await runs.rows("SELECT version FROM stream WHERE stream_id = $1", f"run:{run_id}") == [(4,)]
    assert await runs.rows("SELECT status, model FROM run WHERE id = $1", run_id) == [("running", "m")]
    steps = await runs.rows("SELECT n, status, attempts, duration_ms, span_id FROM run_step WHERE run_id = $1", run_id)
    assert steps == [(1, "completed", 1, 7, "span")]


async def test_each_refused_write_leaves_nothing_and_the_others_are_written(runs: Runs) -> None:
    (good, good_lease), (lost, lost_lease), (stopped, stopped_lease), (steered, steered_lease) = [
        await runs.queued() for _ in range(4)
    ]
    await runs.rows("UPDATE lane SET epoch = epoch + 1 WHERE lane_id = $1", lost_lease.lane_id)
    await runs.rows("UPDATE run SET cancel_reason = 'cancelled' WHERE id = $1", stopped)
    await runs.say(steered)
    writes = [
        runs.write(lost, lost_lease),
        runs.write(stopped, stopped_lease),  # the end of a step is also written then
        runs.write(stopped, stopped_lease, version=1, begins=True),
        runs.write(steered, steered_lease, begins=True, expected_messages=1),
        runs.write(good, good_lease, begins=True, expected_messages=1),
    ]
    for write in writes:
        write.out._rows.append(OutboxRow("kafka", uuid7(), "topic", "", str(write.run_id), "{}", b"{}", WEEK))
    errors = await runs.commit(*writes)
    assert [type(error) for error in errors] == [LaneLost, type(None), RunStopped, MessagesArrived, type(None)]
    assert [await runs.versions(run_id) for run_id in (lost, stopped, steered, good)] == [[], [1], [], [1]]
    assert [write.messages for write in writes] == [1, 1, 1, 2, 1]
    runs_of_group = [str(run_id) for run_id in (lost, stopped, steered, good)]
    keys = await runs.rows("SELECT key FROM outbox WHERE key = ANY($1) ORDER BY position", runs_of_group)
    assert keys == [(str(stopped),), (str(good),)]


async def test_nothing_of_a_refused_write_is_written_in_any_table(runs: Runs) -> None:
    found = [await runs.queued() for _ in range(3)]
    (lost, lost_lease), (steered, _), (good, _) = found
    for run_id, lease in found:
        first = runs.write(run_id, lease, begins=True)
        first.started_model = "m"
        first.begun.append(Begun(1, "model", "m", 1, "span"))
        assert await runs.commit(first) == [None]
    await runs.rows("UPDATE lane SET epoch = epoch + 1 WHERE lane_id = $1", lost_lease.lane_id)
    await runs.say(steered)
    before = [await runs.rows(_ALL_OF, run_id) for run_id in (lost, steered)]
    writes = [runs.with_every_part(run_id, lease, version=1) for run_id, lease in found]
    assert [type(error) for error in await runs.commit(*writes)] == [LaneLost, MessagesArrived, type(None)]
    assert [await runs.rows(_ALL_OF, run_id) for run_id in (lost, steered)] == before
    [(_, _, _, version, events, _, usage, deliveries, messages, position)] = await runs.rows(_ALL_OF, good)
    assert (version, events, usage, deliveries, messages, position) == (2, 2, 1, 1, 2, 1)


async def test_a_write_waits_for_a_message_that_joins_its_run(runs: Runs) -> None:
    """Otherwise the run could end without the message."""
    run_id, lease = await runs.queued()
    write = runs.write(run_id, lease, begins=True, expected_messages=1)
    async with runs.database.begin(tenant_id=TENANT) as tx:
        await tx.sql("SELECT FROM run WHERE id = $1 FOR UPDATE", run_id)
        await tx.sql(SAY, run_id, TENANT, uuid7(), False)
        done = runs.writer.submit(write)
        await runs.until_it_waits(done)
    with pytest.raises(MessagesArrived):
        await done
    assert write.messages == 2


async def test_a_write_waits_for_a_claim_of_its_lane(runs: Runs) -> None:
    run_id, lease = await runs.queued()
    async with runs.database.begin(tenant_id=TENANT) as tx:
        await tx.sql("UPDATE lane SET epoch = epoch + 1 WHERE lane_id = $1", lease.lane_id)
        done = runs.writer.submit(runs.write(run_id, lease))
        await runs.until_it_waits(done)
    with pytest.raises(LaneLost):
        await done
    assert await runs.versions(run_id) == []


async def test_a_message_that_decides_about_an_approval_is_no_message_of_the_run(runs: Runs) -> None:
    run_id, lease = await runs.queued()
    await runs.say(run_id, decides=True)
    assert await runs.commit(runs.write(run_id, lease, begins=True, expected_messages=1)) == [None]


async def test_a_step_that_is_begun_again_runs_and_the_run_keeps_its_start(runs: Runs) -> None:
    run_id, lease = await runs.queued()
    for version, attempt in enumerate((1, 2)):
        begins = runs.write(run_id, lease, version=version, begins=True)
        begins.started_model = f"m{attempt}"
        begins.begun.append(Begun(1, "model", "m", attempt, f"span {attempt}"))
        fails = runs.write(run_id, lease, version=version + 1, events=0)
        fails.ended.append(EndedStep(1, "failed", 7, "no"))
        assert await runs.commit(*([begins, fails] if attempt == 1 else [begins])) == [None] * (3 - attempt)
        if attempt == 1:
            started = await runs.rows("SELECT started_at FROM run WHERE id = $1", run_id)
    steps = await runs.rows("SELECT n, status, attempts, span_id FROM run_step WHERE run_id = $1", run_id)
    assert steps == [(1, "running", 2, "span 2")]
    assert await runs.rows("SELECT started_at FROM run WHERE id = $1", run_id) == started
    assert await runs.rows("SELECT model FROM run WHERE id = $1", run_id) == [("m2",)]


async def test_figures_of_usage_are_added_up_and_those_that_were_never_reported_stay_empty(runs: Runs) -> None:
    run_id, lease = await runs.queued()
    figures = [
        Usage(input_tokens=3, output_tokens=None),
        Usage(input_tokens=None, output_tokens=2),
        Usage(input_tokens=4),
    ]
    writes = []
    for n, usage in enumerate(figures):
        writes.append(runs.write(run_id, lease, version=n))
        writes[-1].used.append(used(f"u{n}", usage))
    assert await runs.commit(*writes[:2]) == [None, None]
    assert await runs.commit(writes[2]) == [None]
    totals = await runs.rows("SELECT input_tokens, cached_tokens, output_tokens FROM run WHERE id = $1", run_id)
    assert totals == [(7, None, 2)]


async def test_a_delivery_that_is_known_already_is_left_as_it_is(runs: Runs) -> None:
    """The fact that the reply was delivered can come before the write that was repeated."""
    run_id, lease = await runs.queued()
    write = runs.write(run_id, lease, begins=True)
    write.completion = runs.completion(run_id, lease)
    assert write.completion.message
    await runs.rows(
        "INSERT INTO delivery (tenant_id, delivery_id, run_id, state, asked_at) VALUES ($1, $2, $3, 'sent', now())",
        TENANT,
        write.completion.message.delivery_id,
        run_id,
    )
    assert await runs.commit(write) == [None]
    assert await runs.rows("SELECT state FROM delivery WHERE run_id = $1", run_id) == [("sent",)]


async def test_the_relays_of_the_messages_are_woken_also_of_the_reply(runs: Runs) -> None:
    woken: list[str] = []
    runs.database.on_messages(woken.append)
    run_id, lease = await runs.queued()
    woken.clear()
    write = runs.write(run_id, lease)
    write.out._rows.append(OutboxRow("kafka", uuid7(), "topic", "", str(run_id), "{}", b"{}", WEEK))
    assert await runs.commit(write) == [None]
    assert woken == ["kafka"]
    write = runs.write(run_id, lease, version=1)
    write.completion = runs.completion(run_id, lease)
    assert await runs.commit(write) == [None]
    assert woken == ["kafka", "rabbit"]


async def test_the_error_of_a_write_whose_caller_has_gone_is_not_reported_as_lost(runs: Runs) -> None:
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    run_id, lease = await runs.queued()
    runs.writer.submit(runs.write(run_id, lease, version=5))
    assert runs.writer.commits.working
    await runs.writer.commits.working
    gc.collect()
    assert reported == []


async def test_a_write_at_another_version_fails_alone(runs: Runs) -> None:
    (bad, bad_lease), (good, good_lease) = [await runs.queued() for _ in range(2)]
    errors = await runs.commit(runs.write(bad, bad_lease, version=5), runs.write(good, good_lease))
    assert [type(error) for error in errors] == [Conflict, type(None)]
    assert [await runs.versions(run_id) for run_id in (bad, good)] == [[], [1]]


async def test_a_group_that_is_repeated_after_its_commit_is_written_once(runs: Runs) -> None:
    run_id, lease = await runs.queued()
    write = runs.write(run_id, lease)
    write.used.append(used("u", Usage(input_tokens=3, output_tokens=2)))
    await runs.writer._call([write], repeated=False)
    await runs.rows("UPDATE lane SET epoch = epoch + 1 WHERE lane_id = $1", lease.lane_id)
    [(refused, *_)] = await runs.writer._call([write], repeated=True)
    assert refused is None
    assert await runs.versions(run_id) == [1]
    assert await runs.rows("SELECT input_tokens, output_tokens FROM run WHERE id = $1", run_id) == [(3, 2)]


async def test_a_completed_run_ends_its_item_and_sends_its_reply_in_the_next_position(runs: Runs) -> None:
    run_id, lease = await runs.queued()
    next_id = uuid7()
    async with runs.database.begin(tenant_id=TENANT) as tx:
        tx.enqueue(RUNS, lane=lease.lane, item=RunItem(next_id), item_id=next_id)
    await runs.rows("INSERT INTO sequence VALUES ($1, 'sent', $2, 4)", TENANT, lease.lane)
    write = runs.write(run_id, lease, begins=True, expected_messages=1)
    write.completion = runs.completion(run_id, lease)
    assert await runs.commit(write) == [None]
    assert write.next is not None
    assert write.next.item_id == next_id
    assert await runs.rows("SELECT status, reply FROM run WHERE id = $1", run_id) == [("completed", b"sealed")]
    assert await runs.rows("SELECT state FROM lane_item WHERE item_id = $1", run_id) == [("done",)]
    sent = await runs.rows("SELECT headers, body FROM outbox WHERE key = $1", str(run_id))
    assert sent == [('{"ce_id":"x","ce_sequence":"5"}', b'{"text":"Hi","position":5}')]
    assert await runs.rows("SELECT state FROM delivery WHERE run_id = $1", run_id) == [("queued",)]
    # The run is over: nothing begins any more.
    again = runs.write(run_id, lease, version=1, begins=True)
    assert [type(error) for error in await runs.commit(again)] == [RunStopped]


async def test_a_lane_goes_on_with_an_item_that_is_due_and_is_given_back_otherwise(runs: Runs) -> None:
    later = utcnow() + timedelta(days=1)
    ended = [await runs.queued() for _ in range(3)]
    async with runs.database.begin(tenant_id=TENANT) as tx:
        for (_, lease), after in zip(ended, (AT_ONCE, timedelta(days=1)), strict=False):
            tx.enqueue(RUNS, lane=lease.lane, item=RunItem(uuid7()), after=after)
    writes = [runs.write(run_id, lease, begins=True, expected_messages=1) for run_id, lease in ended]
    for write, (run_id, lease) in zip(writes, ended, strict=True):
        write.completion = runs.completion(run_id, lease)
    assert await runs.commit(*writes) == [None, None, None]
    assert [write.next is not None for write in writes] == [True, False, False]
    lanes = [
        await runs.rows("SELECT owner IS NULL, ready_at FROM lane WHERE lane_id = $1", lease.lane_id)
        for _, lease in ended
    ]
    assert [given_back for [(given_back, _)] in lanes] == [False, True, True]
    [[(_, of_later)], [(_, of_none)]] = lanes[1:]
    assert of_later >= later
    assert of_none is None


async def test_groups_over_the_same_runs_in_any_order_do_not_deadlock(runs: Runs) -> None:
    found = [await runs.queued() for _ in range(10)]
    other = GroupWriter(runs.database)
    for _ in range(10):
        ahead = [runs.write(run_id, lease, events=0) for run_id, lease in found]
        behind = [runs.write(run_id, lease, events=0) for run_id, lease in reversed(found)]
        await asyncio.gather(runs.commit(*ahead), *(other.submit(write) for write in behind))
