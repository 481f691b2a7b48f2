"""The decision on a call that is in the ledger already."""

from __future__ import annotations

import pytest

from services.plugin.domain import Action, CallOutcome, Effect, RecordedCall, next_action, plain_name, without_answer


@pytest.mark.parametrize(
    ("recorded", "effect", "action"),
    [
        (None, "once", "run"),
        (RecordedCall("started", 1, abandoned=False), "repeatable", "wait"),
        (RecordedCall("started", 1, abandoned=True), "repeatable", "run"),
        (RecordedCall("started", 1, abandoned=True), "keyed", "run"),
        (RecordedCall("started", 1, abandoned=True), "once", "give up"),
        (RecordedCall("succeeded", 1, abandoned=True), "once", "answer"),
        (RecordedCall("failed", 2, abandoned=True), "repeatable", "answer"),
        (RecordedCall("unknown", 1, abandoned=True), "keyed", "answer"),
    ],
)
def test_a_call_is_run_once_or_again_or_never(recorded: RecordedCall | None, effect: Effect, action: Action) -> None:
    assert next_action(recorded, effect) == action


def test_no_answer_is_a_failure_only_if_the_tool_only_reads() -> None:
    assert without_answer("repeatable", "late") == CallOutcome("failed", error="late")
    assert without_answer("keyed", "late").state == "unknown"
    assert without_answer("once", "late").state == "unknown"


def test_names_of_mcp_tools_become_valid_names() -> None:
    assert plain_name("Get-Weather.v2") == "get_weather_v2"
    assert len(plain_name("x" * 100)) == 64
