"""Converts JSON Schemas of older drafts, as tool servers and clients send them, to draft 2020-12. Pure.

Keywords that the check of arguments does not support are left out, so that the tool is offered and only they are not
checked. The tool's server checks its arguments anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from infra.errors import InvalidMessage

MAX_DEPTH = 64

_BY_NAME = frozenset(("properties", "$defs", "definitions", "dependentSchemas"))
"""Keywords whose value is name → schema."""
_LISTS = frozenset(("allOf", "anyOf", "oneOf", "prefixItems"))
"""Keywords whose value is a list of schemas."""
_SCHEMAS = frozenset(
    (
        *("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"),
        *("unevaluatedItems", "unevaluatedProperties"),
    )
)
"""Keywords whose value is a schema."""
_LEFT_OUT = frozenset(("$schema", "patternProperties", "$dynamicRef", "$dynamicAnchor", "$recursiveRef"))
_DATA = frozenset(("const", "default", "enum", "examples"))
"""Keywords whose value is data, in which null means null and not a missing keyword."""
_TYPES = frozenset(("string", "number", "integer", "boolean", "array", "object", "null"))
# Of draft 3 and of programming languages, as libraries that build schemas write them.
_FOREIGN_TYPES = frozenset(("any", "str", "int", "float", "double", "bool", "dict", "map", "list", "tuple", "none"))


def adapted(field: str, schema: Any) -> dict[str, Any]:
    """Returns the schema of an object in draft 2020-12. A missing schema or type means any object.

    Raises InvalidMessage (`field` is the place of the schema) if it is not the schema of an object, or nested too
    deeply.
    """
    if schema is None:
        schema = {}
    if not isinstance(schema, Mapping):
        raise InvalidMessage(field, "must be a JSON Schema of an object")
    check_depth(field, schema)
    found: dict[str, Any] = _adapted(schema)
    types = found.get("type", "object")
    if types != "object" and not (isinstance(types, list) and "object" in types):
        raise InvalidMessage(f"{field}.type", "must be object")
    return {**found, "type": "object"}


def check_depth(field: str, value: Any) -> None:
    """Raises InvalidMessage if `value` is nested more deeply than MAX_DEPTH."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, Mapping | list)
            for child in (item.values() if isinstance(item, Mapping) else item)
        ]
        if not level:
            return
    raise InvalidMessage(field, f"must be nested at most {MAX_DEPTH} levels deep")


def with_parts(schema: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The schema with its direct subschemas changed."""
    new: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _BY_NAME and isinstance(value, Mapping):
            value = {key: change(part) for key, part in value.items()}
        elif name in _LISTS and isinstance(value, list):
            value = [change(part) for part in value]
        elif name in _SCHEMAS and isinstance(value, Mapping):
            value = change(value)
        new[name] = value
    return new


def _adapted(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return {} if schema is None else schema
    kept = {
        name: value for name, value in schema.items() if name not in _LEFT_OUT and (value is not None or name in _DATA)
    }
    new = with_parts(kept, _adapted)
    if isinstance(schema.get("patternProperties"), Mapping):
        # Names that match a pattern would be refused as additional ones.
        new.pop("additionalProperties", None)
    _adapt_types(new)
    _adapt_tuples(new)
    _adapt_limits(new)
    _adapt_requirements(new, schema)
    return new


def _adapt_types(new: dict[str, Any]) -> None:
    """Draft 3 has the type ``any``, and schemas in a list of types. OpenAPI 3.0 has ``nullable``.

    Google's libraries write types in capitals, others those of their language, as ``str``: these are not checked. Any
    other type is a mistake, which the validator names.
    """
    types = new.get("type")
    if isinstance(types, str) and types.lower() in _TYPES:
        new["type"] = types = types.lower()
    if new.pop("nullable", None) is True and isinstance(types, str) and types in _TYPES - {"null"}:
        new["type"] = [types, "null"]
        if isinstance(values := new.get("enum"), list) and None not in values:
            new["enum"] = [*values, None]
    elif (isinstance(types, str) and types.lower() in _FOREIGN_TYPES) or (
        isinstance(types, list) and not all(isinstance(one, str) and one in _TYPES for one in types)
    ):
        del new["type"]


def _adapt_tuples(new: dict[str, Any]) -> None:
    """Up to draft 2019-09 a list of `items` describes a tuple, and `additionalItems` the items after it."""
    rest = new.pop("additionalItems", None)
    if isinstance(items := new.get("items"), list):
        del new["items"]
        if items:
            new["prefixItems"] = [_adapted(item) for item in items]
        if rest is not None:
            new["items"] = _adapted(rest)


def _adapt_limits(new: dict[str, Any]) -> None:
    """Up to draft 4 an exclusive limit is a boolean beside the limit. Draft 3 has `divisibleBy`."""
    for exclusive, limit in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(flag := new.get(exclusive), bool):
            del new[exclusive]
            if flag and limit in new:
                new[exclusive] = new.pop(limit)
    if "divisibleBy" in new:
        new.setdefault("multipleOf", new.pop("divisibleBy"))


def _adapt_requirements(new: dict[str, Any], schema: Mapping[str, Any]) -> None:
    """Draft 3 marks a required property in the property. Up to draft 7 there is `dependencies`."""
    if isinstance(new.get("required"), bool):
        del new["required"]
    properties = schema.get("properties")
    if isinstance(properties, Mapping):
        marked = [
            name for name, part in properties.items() if isinstance(part, Mapping) and part.get("required") is True
        ]
        if marked:
            known = new.get("required")
            new["required"] = [*known, *marked] if isinstance(known, list) else marked
    if isinstance(dependencies := new.pop("dependencies", None), Mapping):
        names = {name: needed for name, needed in dependencies.items() if isinstance(needed, list)}
        schemas = {name: _adapted(needed) for name, needed in dependencies.items() if not isinstance(needed, list)}
        if names:
            new.setdefault("dependentRequired", names)
        if schemas:
            new.setdefault("dependentSchemas", schemas)
