"""A public class has a name that says which one it is."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

from tooling.cli.committed import ROOT

# Classes of two services that share a name because they are the same thing at both ends of one call.
SHARED = {
    "Fact": "a public event of a run: agent lists them, ws_gateway streams them",
    "Reply": "the reply of a run: agent makes it, ws_gateway shows it in OpenAI's shapes",
    "Tool": "a tool that a model may call: plugin offers it, agent shows it to the model",
    "Usage": "the tokens of a run: agent counts them, ws_gateway shows them in OpenAI's shapes",
}


def public_classes(folder: Path, pattern: str = "**/*.py") -> dict[str, list[str]]:
    """Name → the files that define a class of that name at their top level."""
    found = defaultdict(list)
    for path in sorted(folder.glob(pattern)):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(str(path.relative_to(ROOT)))
    return found


INFRA = public_classes(ROOT / "infra")
# Topics, queues, calls and the base of all messages. The messages themselves may have the names of the stored facts.
PROTOS = public_classes(ROOT / "protos", "*.py")
# ws_gateway's message `message`: clients know the name from the schema page.
CONTRACTS = {"Message"}
SERVICES = {folder.name: public_classes(folder) for folder in sorted((ROOT / "services").iterdir()) if folder.is_dir()}


def test_the_public_classes_of_the_kernel_and_of_each_service_have_names_of_their_own() -> None:
    for classes in (INFRA, *SERVICES.values()):
        assert {name: paths for name, paths in classes.items() if len(paths) > 1} == {}


def test_no_service_has_a_class_with_the_name_of_a_class_of_the_kernel_or_of_the_contracts() -> None:
    common = INFRA | PROTOS
    for classes in SERVICES.values():
        assert {name: (common[name], classes[name]) for name in common.keys() & classes.keys() - CONTRACTS} == {}


def test_two_services_share_the_name_of_a_class_only_if_it_is_the_same_thing() -> None:
    users = defaultdict(list)
    for service, classes in SERVICES.items():
        for name in classes:
            users[name].append(service)
    assert {name for name, services in users.items() if len(services) > 1} == SHARED.keys()
