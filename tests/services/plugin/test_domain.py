"""The decision on a call that is in the ledger already."""

from __future__ import annotations

import pytest

from services.plugin.domain import Action, Effect, LedgerEntry, Outcome, next_action, plain_name, without_answer


@pytest.mark.parametrize(
    ("recorded", "effect", "action"),
    [
        (None, "once", "run"),
        (LedgerEntry("started", 1, abandoned=False), "repeatable", "wait"),
        (LedgerEntry("started", 1, abandoned=True), "repeatable", "run"),
        (LedgerEntry("started", 1, abandoned=True), "keyed", "run"),
        (LedgerEntry("started", 1, abandoned=True), "once", "give up"),
        (LedgerEntry("succeeded", 1, abandoned=True), "once", "answer"),
        (LedgerEntry("failed", 2, abandoned=True), "repeatable", "answer"),
        (LedgerEntry("unknown", 1, abandoned=True), "keyed", "answer"),
    ],
)
def test_a_call_is_run_once_or_again_or_never(recorded: LedgerEntry | None, effect: Effect, action: Action) -> None:
    assert next_action(recorded, effect) == action


def test_no_answer_is_a_failure_only_if_the_tool_only_reads() -> None:
    assert without_answer("repeatable", "late") == Outcome("failed", error="late")
    assert without_answer("keyed", "late").state == "unknown"
    assert without_answer("once", "late").state == "unknown"


def test_names_of_mcp_tools_become_valid_names() -> None:
    assert plain_name("Get-Weather.v2") == "get_weather_v2"
    assert len(plain_name("x" * 100)) == 64
