"""How `./claw prove` shows a report."""

from __future__ import annotations

import pytest

from tooling.cli import prove
from tooling.testing.campaign import Kill, Report


def test_a_report_is_shown_with_its_faults(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(
        seed=7,
        seconds=61.4,
        kills=[Kill(3.0, "agent")],
        accepted=12,
        attempts=15,
        failed_attempts={"503": 2, "ReadError": 1},
        repeated_replies=0,
        model_calls=13,
        extra_model_calls=1,
        slowest_seconds=4.2,
        lost=["You said: hello"],
        answered_twice=[],
        out_of_order=[],
        unexpected=[],
        bill=[],
    )
    prove.show(report)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "1 kills in 61 s, seed 7",
        "12 messages accepted in 15 webhook calls; failed calls: 503 2, ReadError 1",
        "slowest reply after 4 s, 1 extra calls of the model",
        "✗ lost: 1",
        "    You said: hello",
        "✓ answered twice: 0",
        "✓ out of order: 0",
        "✓ unexpected replies: 0",
        "✓ faults of the bill: 0",
    ]
