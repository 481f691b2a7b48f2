"""The schema of a tool's arguments in the form that providers take. Pure.

OpenAI and Anthropic refuse all tools of a request if one has alternatives at the root of its schema, OpenAI and Google
also if a list has no `items`, or one schema for each place of it. Only the model reads this form. The arguments are
checked against the whole schema.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from infra.errors import InvalidMessage
from infra.web.json_schema.drafts import with_parts
from infra.web.json_schema.evaluation import Check

_NOT_AT_THE_ROOT = ("$ref", "allOf", "anyOf", "oneOf", "enum", "not")


def tool_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema as one object, whose lists all have `items`. A malformed one, by a client of /v1, stays as it is."""
    try:
        return dict(_with_items(_Objects(schema).merged(schema)))
    except (InvalidMessage, AttributeError, TypeError, ValueError, RecursionError):
        return schema


def with_own_root(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with the part that its root refers to at the root: providers take no reference there."""
    check, whole = Check("schema", schema, {}), dict(schema)
    while "$ref" in whole:
        target = check.resolve(whole.pop("$ref"))
        whole = {**target, **whole}
    return whole


class _Objects:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._check = Check("schema", root, {})
        self._targets: dict[str, dict[str, Any]] = {}
        """The merged schemas by their references. A reference to a schema that is being merged adds nothing."""

    def merged(self, schema: Any) -> dict[str, Any]:
        """The schema with the properties of its parts. A property is required if each alternative requires it."""
        if isinstance(schema, bool):
            return {}
        whole = {name: value for name, value in schema.items() if name not in _NOT_AT_THE_ROOT}
        parts = [self.merged(part) for part in schema.get("allOf", ())]
        parts += [self._alternatives(schema[name]) for name in ("anyOf", "oneOf") if name in schema]
        if "$ref" in schema:
            target = self._target(schema["$ref"])
            whole = target | whole
            parts.append(target)
        properties, required = dict(schema.get("properties", {})), dict.fromkeys(schema.get("required", ()))
        for part in parts:
            more, needed = part.get("properties", {}), part.get("required", ())
            # Schemas that refer to each other repeat their properties many times.
            self._check.spend(1 + len(more) + len(needed))
            for name, value in more.items():
                properties.setdefault(name, value)
            required |= dict.fromkeys(needed)
        found = {"properties": properties, "required": list(required)}
        return whole | {name: value for name, value in found.items() if value or name in schema}

    def _target(self, ref: str) -> dict[str, Any]:
        if ref not in self._targets:
            self._targets[ref] = {}
            self._targets[ref] = self.merged(self._check.resolve(ref))
        return self._targets[ref]

    def _alternatives(self, schemas: Sequence[Any]) -> dict[str, Any]:
        objects = [one for one in map(self.merged, schemas) if "object" in one.get("type", "object")]
        found: dict[str, list[Any]] = {}
        for one in objects:
            for name, part in one.get("properties", {}).items():
                self._check.spend(1 + len(found.setdefault(name, [])))
                if part not in found[name]:
                    found[name].append(part)
        common = set.intersection(*(set(one.get("required", ())) for one in objects)) if objects else set()
        return {
            "properties": {name: parts[0] if len(parts) == 1 else {"anyOf": parts} for name, parts in found.items()},
            "required": sorted(common),
        }


def _with_items(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    new = with_parts(schema, _with_items)
    first, rest = new.pop("prefixItems", []), new.get("items")
    if isinstance(rest, list):
        # As up to draft 2019-09.
        first, rest = map(_with_items, rest), _with_items(new.pop("additionalItems", None))
        new["items"] = {}
    # Schemas of places become alternatives.
    if parts := {msgspec.json.encode(part): part for part in first}:
        parts |= {msgspec.json.encode(rest): rest} if isinstance(rest, Mapping) and rest else {}
        found = list(parts.values())
        new["items"] = found[0] if len(found) == 1 else {"anyOf": found}
    types = new.get("type")
    if types == "array" or (isinstance(types, list) and "array" in types):
        new.setdefault("items", {})
    return new
