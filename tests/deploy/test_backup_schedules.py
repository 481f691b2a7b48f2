"""The schedules of backups call commands and options that exist, with 30 days of retention."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import typer
import yaml

from tooling.cli.app import build
from tooling.stack.backup import take
from tooling.stack.backup.keyfile import key_path
from tooling.stack.checkout import CHECKOUT

FOLDER = CHECKOUT / "infra" / "deploy" / "backup"


def cron_job() -> dict[str, Any]:
    [container] = yaml.safe_load((FOLDER / "cronjob.yaml").read_text())["spec"]["jobTemplate"]["spec"]["template"][
        "spec"
    ]["containers"]
    assert isinstance(container, dict)
    return container


def of_cron() -> list[str]:
    [line] = [line for line in (FOLDER / "clawbus-backup.cron").read_text().splitlines() if line[0] != "#"]
    minute, hour, *days, user, command = line.split(maxsplit=6)
    assert (minute, hour, days, user) == ("17", "3", ["*"] * 3, "root")
    return shlex.split(command.partition(" >")[0])


def of_systemd() -> list[str]:
    lines = (FOLDER / "clawbus-backup.service").read_text().splitlines()
    [command] = [line.removeprefix("ExecStart=") for line in lines if line.startswith("ExecStart=")]
    return shlex.split(command)


@pytest.mark.parametrize("command", [of_cron(), of_systemd(), cron_job()["command"]], ids=["cron", "systemd", "k8s"])
def test_a_schedule_calls_the_backup_with_retention(command: list[str]) -> None:
    arguments = command[command.index("backup") + 1 :]
    app = typer.main.get_command(build(("backup",)))
    parsed = app.commands["backup"].make_context("backup", list(arguments)).params  # type: ignore[attr-defined]
    assert parsed["keep_days"] == 30
    assert parsed["to"].startswith(("/var/", "s3://"))


def test_the_timer_runs_daily_and_catches_up() -> None:
    timer = (FOLDER / "clawbus-backup.timer").read_text()
    assert "OnCalendar=*-*-* " in timer
    assert "Persistent=true" in timer


def test_the_cron_job_has_what_a_backup_of_containers_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in cron_job()["env"]:
        monkeypatch.setenv(variable["name"], variable.get("value", "http://given"))
    found = take.source()
    assert (str(found.keys), found.home) == ("/keys", None)
    assert str(key_path()) == "/backup-key/backup.key"
    mounts = {mount["mountPath"] for mount in cron_job()["volumeMounts"]}
    assert {str(found.keys), str(key_path().parent)} <= mounts
