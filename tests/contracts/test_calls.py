"""The table of calls agrees with the .proto files and with the code of the callers."""

from __future__ import annotations

import re

import pytest

from protos.calls import METHODS, ROUTES, DelegatedRoute
from protos.catalog import SERVICES
from tooling.stack.checkout import CHECKOUT

OF_SERVICES = {method: call for method, call in METHODS.items() if ".sample." not in method}


def declared() -> set[str]:
    """Every method of every .proto file, as ``package.Service/Method``."""
    found = set()
    for file in sorted(CHECKOUT.glob("protos/**/*.proto")):
        text = file.read_text()
        [package] = re.findall(r"^package (\S+);", text, re.MULTILINE)
        for service, body in re.findall(r"^service (\w+) \{(.*?)^\}", text, re.MULTILINE | re.DOTALL):
            found |= {f"{package}.{service}/{method}" for method in re.findall(r"^\s*rpc (\w+)\(", body, re.MULTILINE)}
    return found


def code(service: str) -> str:
    return "\n".join(path.read_text() for path in sorted((CHECKOUT / "services" / service).rglob("*.py")))


def test_every_grpc_method_has_its_callers_and_none_is_invented() -> None:
    assert len(declared()) > 10
    assert set(METHODS) == declared()


@pytest.mark.parametrize("method", OF_SERVICES)
def test_a_service_may_call_a_method_only_if_its_code_does(method: str) -> None:
    _, service, name = re.split(r"\.(\w+)/", method)
    callers = [
        other for other in SERVICES if f"{service}Stub" in code(other) and re.search(rf"\.{name}\b", code(other))
    ]
    assert sorted(METHODS[method].callers) == sorted(callers)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.caller} {route.method} {route.path}")
def test_a_service_may_act_for_a_client_only_where_its_code_does(route: DelegatedRoute) -> None:
    # The code has names of its own in the braces.
    path = re.sub(r"\\\{.*?\\\}", r"\\{[^}]*\\}", re.escape(route.path))
    assert re.search(rf"(?<!\w){path}[\"?]", code(route.caller))


def test_only_the_listed_services_act_for_clients() -> None:
    acting = {service for service in SERVICES if "on_behalf(" in code(service)}
    assert acting == {route.caller for route in ROUTES}
    signing = {service for service in SERVICES if "identities.token(" in code(service)}
    assert signing == {"user"}
