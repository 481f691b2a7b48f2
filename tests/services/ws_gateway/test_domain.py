"""The events of a run for a client: their order, and each of them once."""

from __future__ import annotations

from uuid import UUID

import msgspec
import pytest

from infra.clock import uuid7
from protos.messages.agent import RunCompleted, RunIndeterminate, ToolCall
from services.ws_gateway.domain import Delta, Fact, Follow
from tests.services.ws_gateway.agent import SESSION, failed, run_facts


def facts(run_id: UUID) -> list[Fact]:
    return [
        Fact(fact.n, fact.wire_name(), "2026-01-01T00:00:00.000Z", msgspec.to_builtins(fact))
        for fact in run_facts(run_id)
    ]


def names(follow: Follow, *given: Fact) -> list[tuple[str, int | None]]:
    return [(event.name, event.id) for fact in given for event in follow.fact(fact)]


def test_a_run_is_told_in_order_and_its_reply_comes_before_its_end() -> None:
    follow = Follow(0)
    assert names(follow, *facts(uuid7())) == [
        ("run.started", 1),
        ("step.started", 2),
        ("step.completed", 3),
        ("reply", 4),
        ("run.completed", 5),
    ]
    assert follow.ended


def test_calls_of_the_callers_tools_are_told_with_the_reply_and_only_there() -> None:
    run_id = uuid7()
    call = ToolCall(id="call_1", name="place", arguments="{}")
    for calls in ((), (call,)):
        fact = RunCompleted(run_id=run_id, session_key="s", reply="Let me see.", n=1, tool_calls=calls)
        reply, end = Follow(0).fact(Fact(1, fact.wire_name(), "", msgspec.to_builtins(fact)))
        told = {"run_id": str(run_id), "text": "Let me see."}
        assert reply.data == told | ({"tool_calls": (msgspec.to_builtins(call),)} if calls else {})
        assert end.data == {"run_id": str(run_id), "time": "", "finish_reason": "stop", "filtered": False}


def test_what_the_client_has_is_not_told_again() -> None:
    all_ = facts(uuid7())
    follow = Follow(2)
    assert names(follow, *all_[:3], *all_[:3]) == [("step.completed", 3)]


def test_who_has_the_reply_and_not_the_end_gets_the_end() -> None:
    all_ = facts(uuid7())
    follow = Follow(4)
    assert (follow.read_from, follow.is_known(all_), follow.has_end(all_)) == (2, True, False)
    assert names(follow, *all_[2:]) == [("run.completed", 5)]
    assert follow.ended
    assert (Follow(5).read_from, Follow(5).is_known(all_), Follow(5).has_end(all_)) == (3, True, True)
    assert (Follow(6).is_known(all_), Follow(6).has_end(all_)) == (False, True)


def test_a_gap_is_seen() -> None:
    all_ = facts(uuid7())
    follow = Follow(1)
    assert [follow.misses(fact) for fact in all_] == [False, False, True, True]


def test_an_indeterminate_run_may_go_on_and_the_other_ends_do_not() -> None:
    run_id = uuid7()
    for status, ends in (("failed", True), ("cancelled", True), ("refused", True), ("indeterminate", False)):
        fact = failed(run_id, 1, status)
        follow = Follow(0)
        assert names(follow, Fact(1, fact.wire_name(), "", msgspec.to_builtins(fact))) == [(f"run.{status}", 1)]
        assert follow.ended is ends


def test_an_indeterminate_run_is_told_alike_by_its_own_message_and_by_the_older_one() -> None:
    run_id = uuid7()
    message = RunIndeterminate(run_id=run_id, session_key=SESSION, n=1, step=1, tool="x", error="out of quota")
    follow = Follow(0)
    fact = Fact(1, message.wire_name(), "", msgspec.to_builtins(message))
    assert names(follow, fact) == [("run.indeterminate", 1)]
    assert not follow.ended
    older = msgspec.to_builtins(failed(run_id, 1, "indeterminate"))
    assert {name: fact.data[name] for name in older if name != "status"} == {
        name: value for name, value in older.items() if name != "status"
    }


def test_pieces_of_an_attempt_that_was_given_up_are_dropped() -> None:
    follow = Follow(0)
    pieces = [Delta(1, 1, 1, "a"), Delta(1, 2, 1, "b"), Delta(1, 1, 2, "a"), Delta(2, 1, 1, "c")]
    assert [event.data.text for piece in pieces for event in follow.delta(piece)] == ["a", "b", "c"]
    names(follow, *facts(uuid7()))
    assert follow.delta(Delta(2, 1, 2, "after the end")) == []


def test_a_step_that_is_begun_again_ends_the_pieces_of_the_attempt_before() -> None:
    follow = Follow(0)
    started = facts(uuid7())[1]
    follow.fact(msgspec.structs.replace(started, data=started.data | {"attempt": 2}))
    assert follow.delta(Delta(1, 1, 5, "late")) == []


@pytest.mark.parametrize(("filtered", "reason"), [(False, "length"), (True, "content_filter")])
def test_a_reply_that_was_cut_off_says_so(filtered: bool, reason: str) -> None:
    fact = RunCompleted(run_id=uuid7(), session_key="s", reply="half a", n=1, finish_reason="length", filtered=filtered)
    events = Follow(0).fact(Fact(1, fact.wire_name(), "", msgspec.to_builtins(fact)))
    assert [event.data["finish_reason"] for event in events] == [reason, "length"]
