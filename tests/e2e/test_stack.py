"""The whole stack as `./claw up` has started it: its processes, its files and its ports."""

from __future__ import annotations

import json
import os
import pwd
from typing import Any

import psutil
import pytest

from tooling.stack.engines import ENGINES
from tooling.stack.isolated import is_isolated
from tooling.stack.supervisor import orphans
from tooling.testing.stack import Stack, private_home, run_claw
from tooling.testing.system import System
from tooling.testing.until import until


@pytest.fixture(scope="module")
def full(system: System) -> Stack:
    return Stack(system.home)


def shown(stack: Stack, name: str) -> dict[str, Any]:
    [found] = [part for part in json.loads(run_claw(stack.home, "status", "--json")) if part["name"] == name]
    return dict(found)


def test_status_shows_every_engine_ready(full: Stack) -> None:
    statuses = json.loads(run_claw(full.home, "status", "--json"))
    engines = {status["name"]: status for status in statuses if status["kind"] == "engine"}
    assert set(engines) == set(ENGINES)
    for status in statuses:
        assert status["state"] == "ready", status
        assert status["version"]
        assert status["address"].startswith("127.0.0.1:")
        assert status["latency_ms"] > 0
        assert status["rss_mb"] > 0


def test_the_credentials_are_complete_and_only_the_owner_can_read_them(full: Stack) -> None:
    path = full.home / "credentials.json"
    assert path.stat().st_mode & 0o777 == 0o600
    credentials = json.loads(path.read_text())
    assert credentials["base_url"].startswith("http://127.0.0.1:")
    assert len(credentials["admin_token"]) >= 32
    engines = credentials["engines"]
    for name, keys in {
        "postgres": {"url"},
        "redis": {"url"},
        "kafka": {"bootstrap_servers"},
        "rabbitmq": {"url", "management_url"},
        "milvus": {"url"},
        "s3": {"endpoint", "access_key", "secret_key"},
        "opensearch": {"url"},
    }.items():
        assert keys <= set(engines[name]), name


def test_up_again_changes_nothing(full: Stack) -> None:
    before = full.pids()
    run_claw(full.home, "up")
    assert full.pids() == before


async def test_a_killed_engine_is_restarted_and_counted(full: Stack) -> None:
    before, pid = shown(full, "mailbox"), full.pid("mailbox")
    full.kill("mailbox")

    async def restarted() -> bool:
        return full.pid("mailbox") not in (0, pid)

    await until(restarted)
    full.wait_ready("mailbox")
    after = shown(full, "mailbox")
    assert (after["state"], after["restarts"]) == ("ready", before["restarts"] + 1)


def test_no_process_of_the_stack_runs_as_root(full: Stack) -> None:
    assert {process.username() for process in orphans(full.home)}.isdisjoint({"root"})


def test_milvus_keeps_its_process_files_in_the_stacks_own_folder(full: Stack) -> None:
    """Its fixed folder belongs to the first user of the machine who starts Milvus."""
    assert (full.home / "milvus" / "run" / "process" / "standalone.pid").exists()


def test_no_other_machine_can_reach_the_stack(full: Stack) -> None:
    """If this machine allows no network namespace, Milvus can be reached."""
    findings = json.loads(run_claw(full.home, "doctor", "--json"))
    assert not [finding for finding in findings if finding["level"] == "problem"]
    exposed = [finding["what"] for finding in findings if finding["what"].startswith("reachable")]
    assert len(exposed) == (0 if is_isolated(full.pid("milvus")) else 1)
    ports = [port for text in exposed for port in text.split(": ")[1].split(", ")]
    assert all("milvus" in port for port in ports), exposed


def test_a_port_that_another_process_holds_is_named_with_that_process(full: Stack) -> None:
    held = int(full.redis_url.split(":")[-1].split("/")[0])
    with private_home() as home:
        ports = json.loads((home / "ports.json").read_text())
        (home / "ports.json").write_text(json.dumps({**ports, "valkey": held}))
        with pytest.raises(
            RuntimeError,
            match=r"valkey needs port \d+, which process \d+ of user \w+, valkey-server \(it speaks Redis or Valkey\)",
        ):
            run_claw(home, "up", "--only", "valkey")


def test_the_stack_runs_as_its_own_user_where_root_starts_it(full: Stack) -> None:
    expected = "clawbus" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    assert psutil.Process(full.pid("postgres")).username() == expected
