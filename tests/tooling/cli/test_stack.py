"""Tests of the whole local stack, started by the commands that a newcomer uses."""

from __future__ import annotations

import json
import os
import pwd
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tooling.stack.engines import ENGINES
from tooling.stack.home import SERVICES
from tooling.stack.isolated import is_isolated
from tooling.stack.supervisor import Supervisor, orphans
from tooling.testing.stack import Stack, private_home, run_claw


@pytest.fixture(scope="module")
def full() -> Iterator[Stack]:
    """A stack with all engines and services, started by one `./claw up`."""
    with private_home() as home:
        run_claw(home, "up")
        yield Stack(home)


@pytest.fixture
def home() -> Iterator[Path]:
    """A new state folder, in which nothing was started."""
    with private_home() as path:
        yield path


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in 60 s"
        time.sleep(0.05)


def pids(stack: Stack) -> dict[str, int]:
    return {name: process.pid for name, process in Supervisor(stack.home).processes().items()}


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


def test_a_rolling_restart_needs_a_known_service_that_runs(home: Path) -> None:
    with pytest.raises(RuntimeError, match="SERVICE: 'mail' must be one of user, "):
        run_claw(home, "rolling-restart", "mail")
    with pytest.raises(RuntimeError, match="agent: not running"):
        run_claw(home, "rolling-restart", "agent")


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
    before = pids(full)
    run_claw(full.home, "up")
    assert pids(full) == before


def test_a_killed_engine_is_restarted_and_counted(full: Stack) -> None:
    before = full.pid("mailbox")
    full.kill("mailbox")
    until(lambda: full.pid("mailbox") not in (0, before))
    full.wait_ready("mailbox")
    [status] = [one for one in json.loads(run_claw(full.home, "status", "--json")) if one["name"] == "mailbox"]
    assert (status["state"], status["restarts"]) == ("ready", 1)


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


def test_a_port_that_another_process_holds_is_named_with_that_process(full: Stack, home: Path) -> None:
    ports = json.loads((home / "ports.json").read_text())
    (home / "ports.json").write_text(json.dumps({**ports, "valkey": int(full.redis_url.split(":")[-1].split("/")[0])}))
    with pytest.raises(
        RuntimeError,
        match=r"valkey needs port \d+, which process \d+ of user \w+, valkey-server \(it speaks Redis or Valkey\)",
    ):
        run_claw(home, "up", "--only", "valkey")


def test_down_ends_the_services_before_the_engines(full: Stack) -> None:
    log = full.home / "log" / "supervisord.log"
    before = log.stat().st_size
    run_claw(full.home, "down")
    stopped = re.findall(r"(?:stopped|exited): (\w+) \((.*?)[;)]", log.read_text()[before:])
    assert [what for what in stopped if what[0] in SERVICES] == stopped[: len(SERVICES)]
    assert {how for _, how in stopped[: len(SERVICES)]} == {"exit status 0"}
    run_claw(full.home, "up")


def test_down_leaves_no_process_and_keeps_the_data(home: Path) -> None:
    run_claw(home, "up", "--only", "valkey,postgres,rabbitmq,nginx,mailbox")
    before = (home / "credentials.json").read_text()
    assert len(orphans(home)) > 5
    run_claw(home, "down")
    assert orphans(home) == []
    run_claw(home, "up", "--only", "valkey,postgres,rabbitmq,nginx,mailbox")
    assert (home / "credentials.json").read_text() == before
    run_claw(home, "down", "--wipe")
    assert orphans(home) == []
    assert list(home.iterdir()) == []


def test_a_half_written_state_folder_is_completed(home: Path) -> None:
    """The files are those that a kill in the middle of the first `up` leaves."""
    (home / "postgres" / "data.new.x").mkdir(parents=True)
    (home / "postgres" / "data.new.x" / "PG_VERSION").write_text("18")
    (home / "kafka" / "data.new.x").mkdir(parents=True)
    (home / "supervisor.sock").touch()
    (home / "supervisord.pid").write_text("1")
    (home / "secrets.json.1.2.tmp").write_text('{"postgres.ad')
    run_claw(home, "up", "--only", "postgres,kafka")
    assert not list(home.glob("*/data.new.*"))


def test_up_killed_halfway_is_finished_by_the_next(home: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-m", "tooling.cli", "up", "--only", "valkey,postgres"],
        env={**os.environ, "CLAW_HOME": str(home)},
        stderr=subprocess.DEVNULL,
    )
    until(lambda: any(home.glob("postgres/data.new.*/global")))
    first.kill()
    first.wait()
    run_claw(home, "up", "--only", "valkey,postgres")


def test_engines_whose_supervisor_was_killed_are_found_again(home: Path) -> None:
    run_claw(home, "up", "--only", "valkey,postgres,nginx")
    psutil.Process(int((home / "supervisord.pid").read_text())).kill()
    with pytest.raises(RuntimeError, match="processes of a killed stack still run"):
        run_claw(home, "doctor")
    run_claw(home, "up", "--only", "valkey,postgres,nginx")
    run_claw(home, "down")
    assert orphans(home) == []


def test_data_of_another_version_is_recognised(home: Path) -> None:
    (home / "postgres" / "data").mkdir(parents=True)
    (home / "postgres" / "data" / "PG_VERSION").write_text("15\n")
    with pytest.raises(RuntimeError, match="made by PostgreSQL 15, and this is PostgreSQL 18"):
        run_claw(home, "up", "--only", "postgres")


def test_a_damaged_file_is_named(home: Path) -> None:
    (home / "ports.json").write_text('{"valkey": 63')
    with pytest.raises(RuntimeError, match=r"ports\.json is damaged"):
        run_claw(home, "up", "--only", "valkey")
    (home / "ports.json").unlink()


def test_an_engine_that_cannot_start_is_reported_with_its_log(home: Path) -> None:
    (home / "valkey" / "appendonlydir").mkdir(parents=True)
    (home / "valkey" / "appendonlydir" / "appendonly.aof.manifest").write_text("nonsense\n")
    with pytest.raises(RuntimeError, match=r"valkey ended \d+ times after its start\. Its log"):
        run_claw(home, "up", "--only", "valkey")


def test_an_unknown_name_is_refused(home: Path) -> None:
    with pytest.raises(RuntimeError, match="--only: 'mysql' must be one of postgres, "):
        run_claw(home, "up", "--only", "mysql")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_test_run_that_is_killed_leaves_no_process(number: signal.Signals) -> None:
    program = (
        "from tooling.testing.stack import *\n"
        "with private_home() as home: run_claw(home, 'up', '--only', 'valkey'); print(home, flush=True); time.sleep(99)"
    )
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    home = Path(run.stdout.readline().strip())
    assert orphans(home)
    run.send_signal(number)
    run.communicate()
    until(lambda: not home.parent.exists())
    assert orphans(home) == []


def test_the_stack_runs_as_its_own_user_where_root_starts_it(full: Stack) -> None:
    expected = "clawbus" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    assert psutil.Process(full.pid("postgres")).username() == expected
