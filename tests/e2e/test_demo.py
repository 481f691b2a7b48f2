"""``./claw demo --json`` on the running system."""

from __future__ import annotations

import json

from tooling.testing.stack import run_claw
from tooling.testing.system import System


def test_the_demo_holds_and_prints_one_object_on_one_line(system: System) -> None:
    printed = run_claw(system.home, "demo", "--json")
    [line] = printed.splitlines()
    told = json.loads(line)
    assert told["delivered"] is True
    assert told["reply"]
    assert {source["name"] for source in told["sources"]} <= {"norrland-linnea-2.en.md", "norrland-linnea-2.zh.md"}
    assert told["sources"]
    assert told["duplicates"] == {"sent": 1, "runs": 1, "replies": 1}
    assert told["audit"]["chain_ok"] is True
    assert told["audit"]["records"] > 0
    assert {"channel", "agent", "memory", "billing"} <= set(told["trace"]["services"])
    assert told["trace"]["spans"] > 10
    assert told["usage"]["records"] > 0
    assert told["usage"]["tokens"] > 0
    assert told["usage"]["billed_nanos"] > 0
    assert told["usage"]["currency"] == "USD"
    assert set(told["seconds"]) == {"setup", "answer"}
    shown = json.loads(run_claw(system.home, "run", "show", told["run_id"], "--json"))
    assert shown["run"]["trace_id"] == told["trace_id"]
    # Other tests have made runs, too.
    listed = run_claw(system.home, "run", "list", "--slowest", "--limit", "1000", "--json").splitlines()
    [run] = [run for run in map(json.loads, listed) if run["run_id"] == told["run_id"]]
    assert run["status"] == "completed"
    assert all(seconds > 0 for seconds in run["seconds"].values())
    assert not run_claw(system.home, "run", "list", "--until", "2026-11-30", "--json")
    assert told["run_id"] in run_claw(system.home, "run", "list", "--limit", "1000")
    folded = json.loads(run_claw(system.home, "run", "show", told["run_id"], "--at", "1", "--json"))
    assert (folded["at"], folded["events"][0]["type"], folded["status"]) == (1, "RunStarted", "running")
    lines = json.loads(run_claw(system.home, "logs", "--run", told["run_id"], "--search", "completed", "--json"))
    # The index may not have them yet.
    assert {line["message"] for line in lines} <= {"run completed"}


def test_the_demo_of_billing_goes_from_usage_to_paid_invoices_and_reconciles_to_zero(system: System) -> None:
    [line] = run_claw(system.home, "demo", "--billing", "--json").splitlines()
    told = json.loads(line)
    assert [one["number"] for one in told["invoices"]] == ["INV-000001"] * 3
    assert told["corrections_nanos"] < 0
    assert told["explained"]["records"] == 200
    assert told["answered"]["usage_id"].startswith(told["answered"]["run_id"])
    assert (told["journal_difference"], told["payments_difference"], told["usage_difference"]) == (0, 0, 0)
