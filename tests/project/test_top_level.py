"""The files at the top level, and the pages that list things of the code."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import yaml

from services.agent.definitions.models import NewAgent
from tooling.cli.app import ALIASES, COMMANDS, main

CHECKOUT = Path(__file__).parents[2]


def test_the_workflow_and_the_hook_run_the_commands_of_this_repository() -> None:
    workflow = yaml.safe_load((CHECKOUT / ".github" / "workflows" / "ci.yml").read_text())
    runs = [step["run"] for step in workflow["jobs"]["run"]["steps"] if "run" in step]
    assert runs == [".ci/run"]
    assert os.access(CHECKOUT / ".ci" / "run", os.X_OK)
    hooks = yaml.safe_load((CHECKOUT / ".pre-commit-config.yaml").read_text())
    [[hook]] = [repo["hooks"] for repo in hooks["repos"]]
    assert hook["entry"] == "./claw check"
    assert not hook["pass_filenames"]


def test_the_readme_takes_two_screens() -> None:
    assert len((CHECKOUT / "README.md").read_text().splitlines()) <= 100


def test_the_functions_where_the_main_things_happen_exist() -> None:
    rows = re.findall(
        r"^\| [^|]* \| `([^`]+)` \| `([^`]+)` \|$", (CHECKOUT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 9
    for path, name in rows:
        assert re.search(rf"(def|FUNCTION) {name}\(", (CHECKOUT / path).read_text()), (path, name)


def test_the_operations_page_lists_every_command() -> None:
    listed = set(re.findall(r"`\./claw ([a-z][a-z-]*)", (CHECKOUT / "docs" / "operations.md").read_text()))
    assert listed == set(COMMANDS)


@pytest.mark.parametrize(("alias", "command"), sorted(ALIASES.items()))
def test_an_alias_is_the_command(
    alias: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["claw", alias, "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert f"./claw {command.removeprefix('--help')}" in capsys.readouterr().out


def test_the_page_about_agents_lists_every_field_of_an_agent() -> None:
    # The next chapter has another table.
    text = (CHECKOUT / "docs" / "agents.md").read_text().partition("\n## Approvers\n")[0]
    listed = set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| (`[^|]*)\|", text, re.MULTILINE))))
    fields = {
        name
        for name, field in NewAgent.model_fields.items()
        if name not in ("name", "model", "provider", "system_prompt")
    }
    assert listed == fields
