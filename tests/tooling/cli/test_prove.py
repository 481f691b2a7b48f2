"""How `./claw prove` shows its results."""

from __future__ import annotations

import pytest

from tests.tooling.testing.campaign.test_plan import report
from tooling.cli import prove
from tooling.stack.engines.base import EngineError
from tooling.testing.campaign.mutants import Result


def test_a_report_is_shown_with_its_failures_and_their_history(capsys: pytest.CaptureFixture[str]) -> None:
    prove.show(report(fails=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "1 faults in 61 s, seed 7: kill",
        "3 messages acknowledged in 5 calls; failed calls: 503 2",
        "2 replies, 0 unknown, 0 extra calls of the model, 1 poisoned, 1 dead letters",
        "1 of 2 webhooks answered within 3 s; slowest 4.0 s, slowest reply 4.2 s",
    ]
    assert lines[4].startswith("✗ I1 each accepted message")
    assert lines[5] == "    its run is failed: None c1 message 0 canaryred"
    assert lines[6].startswith("✓ I2")
    assert lines[-4:] == [
        "I1, seed 7: the shortest history that shows it",
        "    its run is failed: x",
        "    client",
        "    model",
    ]


def test_mutants_are_shown_with_the_invariants_that_found_them(capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        Result("none", "", 7, [], "", 9, 1.0),
        Result("outbox", "marks early", 7, ["I1", "I2"], "no run", 9, 1.0),
        Result("hold", "grants all", 7, [], "", 9, 1.0),
    ]
    prove.show_mutants(found)
    assert capsys.readouterr().out.splitlines() == [
        "✓ without none: no invariant failed",
        "✓ without outbox: found by I1, I2: no run",
        "✗ without hold: no invariant failed",
    ]
    assert prove.all_found(found[:2])
    assert not prove.all_found(found)
    assert not prove.all_found([Result("none", "", 7, ["I4"], "x", 9, 1.0)])


def test_an_unknown_fault_is_refused_with_the_known_ones() -> None:
    with pytest.raises(EngineError, match="earthquake must be one of kill, engines"):
        prove.prove(faults="kill,earthquake")
