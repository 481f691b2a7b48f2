"""The OpenAPI pages of all services, as a list of operations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from tooling.stack.home import SERVICES
from tooling.testing.platform import ANSWER_SECONDS, Platform


@dataclass(frozen=True)
class Operation:
    service: str
    method: str
    path: str
    rights: tuple[str, ...]
    """The rights that the page names; one of them is enough."""
    parameters: tuple[dict[str, Any], ...]
    body: dict[str, Any] | None
    """The JSON Schema of the body, if it is JSON."""
    schemas: Mapping[str, Any]
    """The schemas to which others refer."""

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"

    def __str__(self) -> str:
        return f"{self.service}: {self.name}"

    def example(self) -> Any:
        """The page's example of the body, or else one that is made from its schema; None without a body."""
        return None if self.body is None else example(self.body, self.schemas)


async def operations(system: Platform) -> list[Operation]:
    found = []
    for service in SERVICES:
        async with httpx.AsyncClient(base_url=system.url(service), trust_env=False, timeout=ANSWER_SECONDS) as client:
            page = (await client.get("/docs/openapi.json")).json()
        for path, methods in page["paths"].items():
            for method, operation in methods.items():
                content = operation.get("requestBody", {}).get("content", {})
                found.append(
                    Operation(
                        service,
                        method.upper(),
                        path,
                        tuple(right for need in operation["security"] for right in need["bearer"]),
                        tuple(operation.get("parameters", ())),
                        content.get("application/json", {}).get("schema"),
                        page.get("components", {}).get("schemas", {}),
                    )
                )
    return found


def filled(path: str, things: Mapping[str, str]) -> str:
    """The path with ids. things: the part of a path before an id (``agents``) → an id."""
    return re.sub(r"([\w-]+)/\{[^}]+\}", lambda match: f"{match[1]}/{things[match[1]]}", path)


def resolved(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema behind a reference; of alternatives the first that is not null."""
    while True:
        if "$ref" in schema:
            schema = schemas[schema["$ref"].rpartition("/")[2]]
        elif options := schema.get("anyOf") or schema.get("oneOf"):
            schema = next(option for option in options if option.get("type") != "null")
        else:
            return schema


def example(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Any:
    """A value that fits the schema: its example, or the least that it asks for."""
    if examples := schema.get("examples"):
        return examples[0]
    if "default" in schema:
        return schema["default"]
    schema = resolved(schema, schemas)
    for key in ("examples", "enum"):
        if key in schema:
            return schema[key][0]
    for key in ("example", "const", "default"):
        if key in schema:
            return schema[key]
    match schema.get("type"):
        case "object":
            properties = schema.get("properties", {})
            return {name: example(properties[name], schemas) for name in schema.get("required", ())}
        case "array":
            return [example(schema.get("items", {}), schemas)] * schema.get("minItems", 0)
        case "integer" | "number":
            return schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
        case "boolean":
            return True
        case "string":
            known = {"uuid": "00000000-0000-4000-8000-000000000000", "date-time": "2026-01-01T00:00:00Z"}
            return known.get(schema.get("format", ""), "x" * max(1, schema.get("minLength", 1)))
    return {}
