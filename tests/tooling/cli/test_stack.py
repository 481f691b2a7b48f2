"""`./claw up` and `./claw down` with a few engines, also on a damaged or half-written state folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tooling.stack.supervisor import orphans
from tooling.testing.stack import private_home, run_claw


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


def test_a_rolling_restart_needs_a_known_service_that_runs(home: Path) -> None:
    with pytest.raises(RuntimeError, match="SERVICE: 'mail' must be one of user, "):
        run_claw(home, "rolling-restart", "mail")
    with pytest.raises(RuntimeError, match="agent: not running"):
        run_claw(home, "rolling-restart", "agent")


def test_down_leaves_no_process_and_keeps_the_data(home: Path) -> None:
    names = ["valkey", "postgres", "rabbitmq", "nginx", "mailbox"]
    up = ("up", "--only", ",".join(names), "--json")
    assert json.loads(run_claw(home, *up)) == {"home": str(home), "started": names}
    assert json.loads(run_claw(home, *up)) == {"home": str(home), "started": []}
    before = (home / "credentials.json").read_text()
    assert len(orphans(home)) > 5
    down = [sys.executable, "-m", "tooling.cli", "down", "--json"]
    done = subprocess.run(down, env={**os.environ, "CLAW_HOME": str(home)}, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"home": str(home), "data": True}
    # A restore stops the stack in this way, and then deletes the data.
    assert "The data stays" not in done.stderr
    assert orphans(home) == []
    run_claw(home, *up)
    assert (home / "credentials.json").read_text() == before
    assert json.loads(run_claw(home, "down", "--wipe", "--json")) == {"home": str(home), "data": False}
    assert orphans(home) == []
    assert list(home.iterdir()) == []


def test_doctor_and_status_name_the_parts_that_do_not_run(home: Path) -> None:
    assert f"no stack was started in {home} yet" in run_claw(home, "doctor")
    run_claw(home, "up", "--only", "valkey,nginx")
    assert "these parts do not run: postgres, kafka, rabbitmq" in run_claw(home, "doctor")
    run_claw(home, "down")
    assert f"the stack in {home} is stopped\n  → Start it: ./claw up" in run_claw(home, "doctor")
    with pytest.raises(RuntimeError, match=r"The stack does not run\. Start it with \./claw up"):
        run_claw(home, "status")


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


def test_kafka_writes_why_it_cannot_start(home: Path) -> None:
    (home / "kafka" / "data").mkdir(parents=True)
    with pytest.raises(RuntimeError, match=r"kafka ended \d+ times[^✓]*No readable meta\.properties files"):
        run_claw(home, "up", "--only", "kafka")


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
