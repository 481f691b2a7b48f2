"""How `./claw prove` shows its results."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from tests.tooling.testing.campaign.test_plan import report
from tooling.cli import prove
from tooling.stack.engines.base import EngineError
from tooling.testing.campaign import results
from tooling.testing.campaign.mutants import MUTANTS, Mutant, Result
from tooling.testing.system import System


def test_a_report_is_shown_with_its_failures_and_their_history(capsys: pytest.CaptureFixture[str]) -> None:
    prove.show(report(fails=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "1 faults in 61 s, 1 could not be injected, seed 7: kill",
        "3 messages acknowledged in 5 calls; failed calls: 503 2",
        "2 replies, 0 unknown, 0 extra calls of the model, 1 poisoned, 1 dead letters",
        "1 of 2 webhooks answered within 3 s; slowest 4.0 s, slowest reply 4.2 s",
    ]
    assert lines[4] == "50 dead letters beyond the poison: memory kafka:agent.events: boom"
    assert lines[5].startswith("✗ I1 each accepted message")
    assert lines[6] == "    its run is failed: None c1 message 0 canaryred"
    assert lines[7].startswith("✓ I2")
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
    every = [Result("none", "", 7, [], "", 9, 1.0), *(Result(m.guard, "", 7, ["I1"], "x", 9, 1.0) for m in MUTANTS)]
    assert prove.all_found(every)
    assert not prove.all_found([*every[:-1], found[2]])
    assert not prove.all_found([Result("none", "", 7, ["I4"], "x", 9, 1.0), *every[1:]])
    # One that could not end.
    assert not prove.all_found(every[:-1])


async def test_each_mutant_is_kept_as_it_ends_and_the_same_command_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried: list[str] = []

    async def try_one(system: object, models: object, rig: object, seed: int, mutant: Mutant, tell: object) -> Result:
        tried.append(mutant.guard)
        if len(tried) == 2:
            raise TimeoutError
        return Result(mutant.guard, "", seed, ["I1"], "x", 9, 1.0)

    @asynccontextmanager
    async def nothing(*_: object) -> AsyncIterator[tuple[None, None]]:
        yield None, None

    monkeypatch.setattr(prove, "try_one", try_one)
    monkeypatch.setattr(prove, "rigged", nothing)
    monkeypatch.setattr(prove, "model_server", nothing)
    monkeypatch.setattr(System, "at", lambda home: None)
    monkeypatch.setattr(results, "write", partial(results.write, file=tmp_path / "page.md", folder=tmp_path))
    monkeypatch.setattr(results, "mutants_of", partial(results.mutants_of, folder=tmp_path))
    for commit, more in (("c0ffee", 7), ("c0ffee", 1), ("c0de", 7)):
        tried.clear()
        made = results.made("./claw prove --mutants", commit, "here")
        await prove._mutants(tmp_path, 7, Console(file=StringIO()), made, keep=True)
        assert len(tried) == more
    assert [result.guard for result in made.mutants] == ["none", *(m.guard for m in MUTANTS[1:])]


def test_an_unknown_fault_is_refused_with_the_known_ones() -> None:
    with pytest.raises(EngineError, match="earthquake must be one of kill, engines"):
        prove.prove(faults="kill,earthquake")
