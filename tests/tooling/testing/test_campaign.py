"""The verdict of a campaign: each fault that it looks for is found in a ledger that has it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tooling.testing.campaign import Conversation, Report, judge_replies
from tooling.testing.vendors import Accepted

SENT = [Conversation("a", {"one": 1.0, "two": 2.0}), Conversation("b", {"three": 3.0})]
GOOD = [("a", "one", 4.0), ("b", "three", 5.0), ("a", "two", 9.0)]


def ledger(*replies: tuple[str, str, float]) -> list[Accepted]:
    return [Accepted(to, f"You said: {text}", str(n), {}, at) for n, (to, text, at) in enumerate(replies)]


def test_one_reply_for_each_message_in_its_order_has_no_fault() -> None:
    assert judge_replies(SENT, ledger(*GOOD)) == ([], [], [], [], 7.0)


@pytest.mark.parametrize(
    ("replies", "fault", "expected"),
    [
        (GOOD[:2], "lost", ["You said: two"]),
        ([*GOOD, ("a", "two", 10.0)], "twice", ["You said: two"]),
        ([("a", "two", 4.0), ("a", "one", 5.0), GOOD[1]], "out_of_order", ["a"]),
        ([*GOOD, ("a", "four", 10.0)], "unexpected", ["You said: four"]),
        ([*GOOD, ("c", "three", 10.0)], "unexpected", ["You said: three"]),
        ([GOOD[0], GOOD[2], ("a", "three", 5.0)], "lost", ["You said: three"]),
    ],
)
def test_each_fault_is_found(replies: list[tuple[str, str, float]], fault: str, expected: list[str]) -> None:
    assert getattr(judge_replies(SENT, ledger(*replies)), fault) == expected


@pytest.mark.parametrize("fault", ["lost", "answered_twice", "out_of_order", "unexpected", "bill"])
def test_a_report_with_a_fault_does_not_hold(fault: str) -> None:
    numbers: dict[str, Any] = dict.fromkeys(
        ("seed", "seconds", "accepted", "attempts", "repeated_replies", "model_calls", "extra_model_calls"), 1
    )
    lists: dict[str, Any] = {"kills": [], "lost": [], "answered_twice": [], "out_of_order": [], "unexpected": []}
    good = Report(**numbers, **lists, failed_attempts={}, slowest_seconds=1, bill=[])
    assert good.held
    assert not msgspec.structs.replace(good, **{fault: ["x"]}).held
