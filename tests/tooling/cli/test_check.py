"""Tests of the checks that `claw check` makes, and of its output."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from tooling.cli import check
from tooling.cli.committed import ROOT, committed_files


# Each value is put together here, so that this file itself contains no forbidden line.
@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("-----BEGIN " + "RSA PRIVATE KEY-----", "a private key"),
        ("-----BEGIN " + "PRIVATE KEY-----", "a private key"),
        ('key = "sk-' + 'proj-abcdefghijklmnopqrst"', "a vendor's token"),
        ("token: xoxb-" + "123456789012-abc", "a vendor's token"),
        ("bot 1234567890:" + "AA" + "h" * 33, "a vendor's token"),
        ("postgresql://claw:" + "Xk29fj@db:5432/claw", "a password in a URL"),
        ("--extra-" + "index-url https://pypi.example.com", "an index address"),
        ('"resolved"' + ': "https://npm.example.com/x"', "an index address"),
        ("path = /home" + "/ada/claw", "a machine's path"),
        ('"/work' + '/main"', "a machine's path"),
    ],
)
def test_a_line_that_must_not_be_committed_is_named_without_its_value(line: str, what: str) -> None:
    assert check.unwanted({"a.py": f"fine\n{line}\n"}) == [f"a.py:2: looks like {what}"]


@pytest.mark.parametrize(
    "line",
    [
        "amqp://user:password@host:5672/vhost",
        "http://127.0.0.1:9000",
        'f"postgresql://{user}:{password}@{host}/claw"',
        "https://example.com/home/ada",
        "see services/work" + "/main.py",
        "task-sk-1",
    ],
)
def test_an_innocent_line_passes(line: str) -> None:
    assert check.unwanted({"a.py": line}) == []


def test_only_files_that_git_tracks_are_read(tmp_path: Path) -> None:
    subprocess.run(["git", "init", str(tmp_path)], check=True, capture_output=True)
    (tmp_path / "known.py").write_text("x")
    (tmp_path / "picture.png").write_bytes(b"\0")
    subprocess.run(["git", "-C", str(tmp_path), "add", "."], check=True, capture_output=True)
    (tmp_path / "unknown.py").write_text("y")
    assert committed_files(tmp_path) == {"known.py": "x"}


def test_all_checks_run_and_a_failure_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = {"first": lambda: "a.py:1: wrong", "second": lambda: ""}
    monkeypatch.setattr(check, "_checks", lambda: steps)
    with pytest.raises(typer.Exit) as end:
        check.check()
    out = capsys.readouterr()
    assert end.value.exit_code == 1
    assert "second … ok" in out.out
    assert "failed: first" in out.out
    assert "a.py:1: wrong" in out.err

    with pytest.raises(typer.Exit):
        check.check(json=True)
    rows = json.loads(capsys.readouterr().out)
    assert [(row["check"], row["ok"]) for row in rows] == [("first", False), ("second", True)]
    assert all(row["seconds"] >= 0 for row in rows)


def test_the_output_of_a_failed_tool_is_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("import os\n")
    assert "F401" in check._tool("ruff", "check", ".")
    (tmp_path / "a.py").write_text("")
    assert check._tool("ruff", "check", ".") == ""


INFRA_ROOMS = ("service", "lanes", "bus", "web", "security", "postgres", "outgoing", "stores", "observe")
INFRA_MODULES = ("errors", "clock", "failpoint", "connections")
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
SERVICE_ROOMS = {
    container.replace(".", "/"): [room.strip() for layer in contract["layers"] for room in re.split("[|:]", layer)]
    for contract in CONTRACTS
    for container in contract.get("containers", ())
    if container.startswith("services.")
}
TREE = {
    "infra/__init__.py": "",
    **{f"infra/{room}/__init__.py": "" for room in INFRA_ROOMS},
    **{f"infra/{module}.py": "" for module in INFRA_MODULES},
    **{f"{service}/__init__.py": "" for service in SERVICE_ROOMS},
    **{f"{service}/{room}.py": "" for service, rooms in SERVICE_ROOMS.items() for room in rooms},
    "services/billing/rating.py": "import services.billing.usage",
    "services/channel/files.py": "import services.channel.intake",
    "services/log_aggregator/index.py": "import services.log_aggregator.handlers",
    "services/memory/files.py": "import services.memory.search",
    "services/agent/runs.py": "import services.agent.sessions",
    "infra/clock.py": "import tooling.cli",
    "infra/bus/kafka.py": "import services.a",
    "infra/postgres/tx.py": "import infra.lanes.lane",
    "infra/lanes/lane.py": "import infra.bus.kafka",
    "tooling/__init__.py": "",
    "tooling/cli/__init__.py": "",
    "tooling/cli/map.py": "import services\nimport services.a\nimport tooling.testing.stack",
    "tooling/bench/__init__.py": "",
    "tooling/testing/__init__.py": "",
    "tooling/testing/stack.py": "import tooling.cli.map",
    "tooling/stack/__init__.py": "",
    "tooling/stack/home.py": "import protos",
    "protos/__init__.py": "",
    "protos/catalog.py": "import infra.clock",
    "services/__init__.py": "",
    "services/a/__init__.py": "",
    "services/a/handlers.py": "import tooling.testing",
    "services/a/domain.py": "import sqlalchemy",
    "services/a/invoices/__init__.py": "",
    "services/a/invoices/events.py": "import infra.clock",
    "services/b/__init__.py": "import services.a",
    "services/b/usage.py": "import services.b.ledger",
    "services/b/ledger.py": "import services.b.usage",
}
ILLEGAL = [
    "protos.catalog -> infra.clock",
    "infra.clock -> tooling.cli",
    "infra.bus.kafka -> services.a",
    "infra.postgres.tx -> infra.lanes.lane",
    "infra.lanes.lane -> infra.bus.kafka",
    "tooling.testing.stack -> tooling.cli.map",
    "services.a.handlers -> tooling.testing",
    "services.b -> services.a",
    "services.agent.runs -> services.agent.sessions",
    "services.billing.rating -> services.billing.usage",
    "services.channel.files -> services.channel.intake",
    "services.log_aggregator.index -> services.log_aggregator.handlers",
    "services.memory.files -> services.memory.search",
    "services.a.domain -> sqlalchemy",
    "services.a.invoices.events -> infra.clock",
]
LEGAL = ["tooling.cli.map -> services.a", "tooling.stack.home -> protos"]


def test_layers_are_kept_by_the_project_s_own_rules(tmp_path: Path) -> None:
    for path, text in TREE.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--config", ROOT / "pyproject.toml"],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 1, result.stdout
    assert [arrow for arrow in ILLEGAL if f"{arrow} (l." not in result.stdout] == []
    assert "No cycles are allowed in services.b." in result.stdout
    assert [arrow for arrow in LEGAL if arrow in result.stdout] == []
