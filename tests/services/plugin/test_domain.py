"""What is done with a call that was seen before."""

from __future__ import annotations

import pytest

from services.plugin.domain import Effect, Outcome, Recorded, Step, next_step, plain_name, without_answer


@pytest.mark.parametrize(
    ("recorded", "effect", "step"),
    [
        (None, "once", "run"),
        (Recorded("started", 1, abandoned=False), "repeatable", "wait"),
        (Recorded("started", 1, abandoned=True), "repeatable", "run"),
        (Recorded("started", 1, abandoned=True), "keyed", "run"),
        (Recorded("started", 1, abandoned=True), "once", "give up"),
        (Recorded("succeeded", 1, abandoned=True), "once", "answer"),
        (Recorded("failed", 2, abandoned=True), "repeatable", "answer"),
        (Recorded("unknown", 1, abandoned=True), "keyed", "answer"),
    ],
)
def test_a_call_is_run_once_or_again_or_never(recorded: Recorded | None, effect: Effect, step: Step) -> None:
    assert next_step(recorded, effect) == step


def test_no_answer_is_a_failure_only_where_nothing_can_have_happened() -> None:
    assert without_answer("repeatable", "late") == Outcome("failed", error="late")
    assert without_answer("keyed", "late").state == "unknown"
    assert without_answer("once", "late").state == "unknown"


def test_names_of_others_become_ours() -> None:
    assert plain_name("Get-Weather.v2") == "get_weather_v2"
    assert len(plain_name("x" * 100)) == 64
