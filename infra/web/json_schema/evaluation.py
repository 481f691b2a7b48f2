"""The evaluation of a schema on a value: follows references, counts steps, and finds the first keyword that fails."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

from infra.errors import InvalidMessage

MAX_STEPS = 100_000
"""Of one check. A step takes about a microsecond."""

Schema = Mapping[str, Any]


class Failure(NamedTuple):
    """The first keyword that a value does not fit, and the path of the value."""

    path: tuple[str | int, ...]
    keyword: str
    rule: Any
    value: Any
    schema: Schema


class Check:
    """One application of a schema, with its remaining steps.

    field: the name of the value in errors. keywords: the evaluation of each keyword.
    """

    def __init__(self, field: str, root: Schema, keywords: Mapping[str, Evaluate]) -> None:
        self.field = field
        self._root = root
        self._keywords = keywords
        self.steps = MAX_STEPS

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            reason = f"the check against its schema takes more than {MAX_STEPS} steps; make the schema or value smaller"
            raise InvalidMessage(self.field, reason)

    def first_failure(self, schema: Any, value: Any, path: tuple[str | int, ...]) -> Failure | None:
        if isinstance(schema, bool):
            self.spend(1)
            return None if schema else Failure(path, "false", False, value, {})
        # Unknown keywords are passed over, and a schema may have thousands of them.
        self.spend(1 + len(schema) // 16)
        for keyword, rule in schema.items():
            evaluate = self._keywords.get(keyword)
            if evaluate is None:
                continue
            self.spend(1)
            result = evaluate(self, rule, value, schema, path)
            if result is False:
                return Failure(path, keyword, rule, value, schema)
            if result is not True:
                return result
        return None

    def fits(self, schema: Any, value: Any) -> bool:
        return self.first_failure(schema, value, ()) is None

    def resolve(self, ref: str) -> Any:
        """The part of the root schema to which `ref` points. Raises InvalidMessage if there is none."""
        target: Any = self._root
        if ref.startswith("#/"):
            for part in ref[2:].split("/"):
                self.spend(1 + len(part) // (4 if "%" in part else 1024))
                name = unquote(part).replace("~1", "/").replace("~0", "~")
                try:
                    target = target[int(name)] if isinstance(target, list) else target[name]
                except (KeyError, IndexError, ValueError, TypeError):
                    raise _missing_target(self.field) from None
        elif ref != "#":
            target = self._anchored(self._root, ref[1:])
        if not isinstance(target, bool | Mapping):
            raise _missing_target(self.field)
        return target

    def _anchored(self, part: Any, anchor: str) -> Any:
        """The first object in `part` with this anchor."""
        self.spend(1)
        if isinstance(part, Mapping) and part.get("$anchor") == anchor:
            return part
        inner = part.values() if isinstance(part, Mapping) else part if isinstance(part, list) else ()
        return next((found for one in inner if (found := self._anchored(one, anchor)) is not None), None)

    def canonical(self, value: Any) -> str:
        """Equal for equal JSON values, and for no others."""
        self.spend(1)
        match value:
            case None | bool():
                return str(value)
            case int():
                self.spend(value.bit_length() // 1024)
                # Texts, because Python's hash of a text is random and that of a number is not.
                return hex(value)
            case float():
                return hex(int(value)) if value.is_integer() else repr(value)
            case str():
                return self._quoted(value)
            case list() | tuple():
                return f"[{','.join(map(self.canonical, value))}]"
            case _:
                items = sorted((str(name), self.canonical(item)) for name, item in value.items())
                return "{" + ",".join(f"{self._quoted(name)}:{item}" for name, item in items) + "}"

    def _quoted(self, text: str) -> str:
        self.spend(len(text) // 256)
        return json.dumps(text)

    def evaluated_properties(self, schema: Any, value: Mapping[str, Any]) -> set[str]:
        """The properties that the schema or a fitting subschema describes."""
        self.spend(1 + len(value) // 16)
        if isinstance(schema, bool):
            return set()
        properties = schema.get("properties", {})
        self.spend(len(properties) // 16)
        found = {name for name in properties if name in value}
        if "additionalProperties" in schema or "unevaluatedProperties" in schema:
            return set(value)
        for part in self._applied(schema, value):
            found |= self.evaluated_properties(part, value)
        return found

    def evaluated_items(self, schema: Any, value: Sequence[Any]) -> set[int]:
        """The indexes of the items that the schema or a fitting subschema describes."""
        self.spend(1 + len(value) // 16)
        if isinstance(schema, bool):
            return set()
        if "items" in schema or "unevaluatedItems" in schema:
            return set(range(len(value)))
        found = set(range(min(len(schema.get("prefixItems", ())), len(value))))
        if "contains" in schema:
            found |= {n for n, item in enumerate(value) if self.fits(schema["contains"], item)}
        for part in self._applied(schema, value):
            found |= self.evaluated_items(part, value)
        return found

    def _applied(self, schema: Schema, value: Any) -> Iterator[Any]:
        """The subschemas that apply to the value itself, and that it fits."""
        if "$ref" in schema:
            yield self.resolve(schema["$ref"])
        for keyword in ("allOf", "anyOf", "oneOf"):
            yield from (part for part in schema.get(keyword, ()) if self.fits(part, value))
        if isinstance(value, Mapping):
            dependent = schema.get("dependentSchemas", {})
            self.spend(len(dependent) // 16)
            yield from (part for name, part in dependent.items() if name in value)
        if "if" in schema:
            if self.fits(schema["if"], value):
                yield schema["if"]
                yield schema.get("then", True)
            else:
                yield schema.get("else", True)


def _missing_target(field: str) -> InvalidMessage:
    return InvalidMessage(field, "a $ref of the schema must point to a part of the schema")


# An evaluation returns True if the value fits, False or the failure of a part of it if it does not.
Result = bool | Failure
Path = tuple[str | int, ...]
Evaluate = Callable[[Check, Any, Any, Schema, Path], Result]
