"""The documents name only commands, options, files, routes, settings, metrics and alerts that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Final

import yaml
from typer.main import get_command

from infra.service.settings import Settings
from protos.catalog import SERVICES
from tests.security.rights import RIGHTS
from tooling.cli.app import ALIASES, COMMANDS, build
from tooling.cli.committed import ROOT, committed_files

FILES: Final = committed_files(ROOT)
DOCUMENTS: Final = {
    name: text for name, text in FILES.items() if re.match(r"([A-Z]+|docs/.*|infra/(GLOSSARY|decisions/.*))\.md$", name)
}
# The recipes of the one make files; the history of the other names things that were renamed since.
TODAY: Final = {name: text for name, text in DOCUMENTS.items() if name not in ("CONTRIBUTING.md", "CHANGELOG.md")}
PROGRAMS: Final = "\n".join(text for name, text in FILES.items() if not name.endswith(".md"))
# typer has a copy of click, so its commands have no public type.
COMMAND_LINE: Final[Any] = get_command(build(COMMANDS))
ROUTES: Final = {re.sub(r"\{\w+\}", "{}", route) for routes in RIGHTS.values() for route in routes}


def found(pattern: str, documents: dict[str, str] = TODAY) -> Iterator[tuple[str, str]]:
    """Document and text of each match of `pattern`."""
    for name, text in documents.items():
        for match in re.finditer(pattern, text):
            yield name, match[match.lastindex or 0]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_files_and_headings_that_exist() -> None:
    wrong = []
    for name, link in found(r"\]\(((?!\w+://)[^)\s]+)\)", DOCUMENTS):
        target, _, anchor = link.partition("#")
        path = (ROOT / name).parent / target if target else ROOT / name
        if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
            wrong.append((name, link))
    assert wrong == []


def unknown_word(line: str) -> str | None:
    """The first word of `line`, which follows ``./claw``, that is not one of its commands or options."""
    command, words = COMMAND_LINE, line.split()
    while hasattr(command, "commands") and words and (word := re.match(r"[a-z-]+", words[0])):
        if word[0] in ALIASES:
            return None
        if word[0] not in command.commands:
            return word[0]
        command = command.commands[word[0]]
        words.pop(0)
    if command.name == "test":  # pytest has the options
        return None
    options = {option for parameter in command.params for option in parameter.opts}
    return next((word for word in re.findall(r"(?<!\S)\[?(--[a-z-]+)", " ".join(words)) if word not in options), None)


def test_commands_and_options_exist() -> None:
    lines = found(r"\./claw ([a-z][^`\n#&]*)", DOCUMENTS)
    assert [(name, line) for name, line in lines if unknown_word(line)] == []


def without_json(command: Any, *names: str) -> list[str]:
    """The commands below `command` that do not take ``--json``."""
    if hasattr(command, "commands"):
        return [line for name, one in command.commands.items() for line in without_json(one, *names, name)]
    return [] if any("--json" in parameter.opts for parameter in command.params) else [" ".join(names)]


def test_each_command_takes_json() -> None:
    assert without_json(COMMAND_LINE) == ["test"]  # pytest has the options


def test_files_exist() -> None:
    paths = found(r"`((?:infra|services|tooling|tests|protos|docs|results)/[\w./-]+)`")
    assert [(name, path) for name, path in paths if not (ROOT / path).exists()] == []


def test_routes_exist() -> None:
    routes = found(r"`((?:GET|POST|PUT|PATCH|DELETE) /[^`?]+)")
    assert [(name, route) for name, route in routes if re.sub(r"\{[^}]*\}", "{}", route) not in ROUTES] == []


def test_settings_and_metrics_exist() -> None:
    wrong = []
    for name, word in found(r"\b(CLAW_[A-Z_]*[A-Z]|claw_[a-z_]*[a-z])\b"):
        # A field of a class of settings is the variable without the prefix, in lower case.
        if word not in PROGRAMS and not re.search(rf"^    {word[5:].lower()}: ", PROGRAMS, re.MULTILINE):
            wrong.append((name, word))
    assert wrong == []


def test_the_operations_page_lists_each_setting_of_a_service() -> None:
    wanted = set()
    for service in SERVICES:
        if f"services/{service}/settings.py" not in FILES:
            continue  # it has the settings of all
        module = import_module(f"services.{service}.settings")
        [settings] = [
            one
            for one in vars(module).values()
            if isinstance(one, type) and issubclass(one, Settings) and one is not Settings
        ]
        wanted |= {
            str(field.validation_alias or f"CLAW_{name.upper()}") for name, field in settings.model_fields.items()
        }
    table = re.findall(
        r"^\|[^|]*\| (`[^|]*)\|", TODAY["docs/operations.md"].partition("\n## Settings\n")[2], re.MULTILINE
    )
    listed = set(re.findall(r"`((?:CLAW|OTEL)_\w+)`", "".join(table)))
    assert listed == wanted


def test_alerts_exist_and_the_operations_page_lists_each() -> None:
    groups = yaml.safe_load(FILES["infra/deploy/prometheus/alerts.yml"])["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"]}
    assert [(name, alert) for name, alert in found(r"alerts? `(\w+)`") if alert not in alerts] == []
    table = TODAY["docs/operations.md"].partition("\n## Metrics and alerts\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]*)\|", table, re.MULTILINE)))) == alerts
