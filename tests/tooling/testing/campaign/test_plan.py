"""The plan of faults, the mutants' changes, and the page of results."""

from __future__ import annotations

import asyncio
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.web.http import PROCESS
from tests.tooling.testing.campaign.made_up import good
from tooling.stack.checkout import CHECKOUT
from tooling.testing.campaign import faults, results, rig
from tooling.testing.campaign.campaign import Availability, Report, Shown
from tooling.testing.campaign.evidence import DeadLetter
from tooling.testing.campaign.faults import FAULTS, Injected, Planned, plan
from tooling.testing.campaign.invariants import judge
from tooling.testing.campaign.mutants import MUTANTS, Mutant, Result


def test_the_same_seed_gives_the_same_plan() -> None:
    assert plan(7, list(FAULTS), 30) == plan(7, list(FAULTS), 30)
    assert plan(7, list(FAULTS), 30) != plan(8, list(FAULTS), 30)


def test_a_plan_has_every_kind_and_only_the_given_targets() -> None:
    kinds = [name for name, kind in FAULTS.items() if kind.targets]
    assert {one.fault for one in plan(1, list(FAULTS), len(kinds))} == set(kinds)
    assert {one.target for one in plan(1, ["kill", "poison"], 30, ["agent"])} == {"agent"}
    assert plan(1, ["duplicates"], 30) == []


def test_kills_follow_each_other_faster_than_faults_that_last() -> None:
    assert sum(one.pause for one in plan(1, ["kill", "engines"], 1000)) < 3000
    assert min(one.pause for one in plan(1, ["stop", "wipe"], 1000)) >= 3


def test_each_planned_fault_can_be_injected() -> None:
    for name, kind in FAULTS.items():
        assert not kind.targets or hasattr(faults.Injector, f"_{name}")


def test_with_two_instances_of_each_service_both_are_killed() -> None:
    assert {one.target for one in plan(1, ["kill"], 30, ["agent"], instances=2)} == {"agent", "agent_twin"}
    assert {one.target for one in plan(1, ["engines"], 30, ["kafka"], instances=2)} == {"kafka"}


async def test_an_instance_is_ready_if_it_answers_itself_at_the_port_that_two_share() -> None:
    pids = [11, 22, 11, 22, 11, *[11] * rig.ASKED]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\n{PROCESS}: {pids.pop(0)}\r\ncontent-length: 0\r\n\r\n".encode())
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        ports = {"agent": server.sockets[0].getsockname()[1]}
        instance: Any = SimpleNamespace(_ports=ports, stack=SimpleNamespace(pid={"agent": 11, "agent_twin": 22}.get))
        assert await rig.Rig.is_ready(instance, "agent_twin")
        assert await rig.Rig.is_ready(instance, "agent")
        assert await rig.Rig.is_ready(instance, "agent_twin")
        assert not await rig.Rig.is_ready(instance, "agent_twin")


async def test_a_fault_that_cannot_be_injected_is_told_and_the_campaign_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    killed: list[str] = []

    def restart(_: str) -> None:
        raise RuntimeError("./claw up failed")

    async def works(self: faults.Injector, target: str, answers: list[bool] = [False, True]) -> bool:  # noqa: B006
        lines.append(f"{target} is asked")
        return answers.pop(0)

    monkeypatch.setattr(faults, "PAUSE", (0.0, 0.0))
    monkeypatch.setattr(faults.Injector, "_works", works)
    stack: Any = SimpleNamespace(restart=restart, kill=lambda target, _: killed.append(target))
    injector = faults.Injector(stack, None, None, nullcontext, lines.append)
    await injector.run([Planned(0, "restart", "kafka"), Planned(0, "kill", "agent")], 0.0)
    assert lines == [
        "1 of 2: restart kafka not injected: RuntimeError: ./claw up failed",
        # A signal to a process that is down or starting would be no fault.
        "agent is asked",
        "agent is asked",
        "2 of 2: kill agent",
    ]
    assert killed == ["agent"]
    assert [fault.missed for fault in injector.injected] == [True, False]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.guard)
def test_the_guard_of_each_mutant_is_where_it_is_removed(mutant: Mutant, tmp_path: Path) -> None:
    for change in mutant.changes:
        copy = tmp_path / change.file
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(CHECKOUT / change.file, copy)
        change.apply(tmp_path)
        compile(copy.read_text(), change.file, "exec")
    assert mutant.changes
    assert set(mutant.faults) <= set(FAULTS)


def report(*, fails: bool) -> Report:
    evidence = good()
    if fails:
        evidence.runs[0].status = "failed"
        letter = DeadLetter("x", "memory", "kafka:agent.events", "m", "boom", "")
        evidence.dead_letters += [letter] * 50
    return Report(
        seed=7,
        faults=["kill"],
        planned=1,
        seconds=61.4,
        injected=[
            Injected(3.0, "kill", "agent", recovered_after=1.5),
            *([Injected(9.0, "kill", "user", "TimeoutError", missed=True)] if fails else []),
        ],
        accepted=3,
        attempts=5,
        failed_attempts={"503": 2},
        forged=1,
        replies=2,
        unknown=0,
        dead_letters=1,
        unplanned=evidence.unplanned(),
        poison=1,
        extra_model_calls=0,
        invariants=judge(evidence),
        availability=Availability(2, 1, 0.1, 4.0, 4.2),
        shown=[Shown("I1", "its run is failed: x", ["client", "model"])] if fails else [],
    )


def test_the_page_of_results_begins_with_failures_and_keeps_other_reports(tmp_path: Path) -> None:
    page, folder = tmp_path / "RESULTS.md", tmp_path / "results"
    survived = [Result("none", "", 7, [], "", 9, 1.0), Result("outbox", "marks early", 7, [], "", 9, 1.0)]
    results.write(results.made("./claw prove --mutants --report", "c0ffee", "here", mutants=survived), page, folder)
    results.write(results.made("./claw prove --seed 7 --report", "c0ffee", "here", report(fails=True)), page, folder)
    text = page.read_text()
    failures = text[text.index("## Failures") : text.index("## Invariants")]
    assert "- **I1 failed** once, seed 7" in failures
    assert "its run is failed: x. `./claw prove --seed 7 --report`" in failures
    assert "- **Mutant survived**: without outbox (marks early)" in failures
    assert "**50 dead letters beyond the poison**, seed 7" in failures
    assert text.count("50 of memory kafka:agent.events: boom") == 2
    assert "- 1 of 2 faults could not be injected, seed 7, commit c0ffee: kill user: TimeoutError." in failures
    assert "not killed in a campaign on this page: channel, billing," in failures
    assert "The largest campaign had 1 faults" in failures
    assert "no replica is lost" in failures
    assert "| I1 | each accepted message" in text
    assert "1 of 2 webhooks were answered 200" in text
    assert "| kill | 1 | 1.5 s | 1.5 s |" in text
    assert json.loads((folder / "kill-7.json").read_text())["report"]["seed"] == 7
    results.write(results.made("./claw prove --seed 7 --report", "c0ffee", "here", report(fails=False)), page, folder)
    assert "I1 failed" not in page.read_text()
    assert "beyond the poison" not in page.read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["kill-7.json", "mutants.json"]


def test_the_interval_is_wilsons() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I: 81 of 263 and 0 of 20.
    assert [round(bound, 4) for bound in results.wilson(81, 263)] == [0.2553, 0.3662]
    assert [round(bound, 4) for bound in results.wilson(0, 20)] == [0.0, 0.1611]
