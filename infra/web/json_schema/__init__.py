"""JSON Schemas (draft 2020-12) of tenants: checked when they are set up, and applied with a bound on the work.

A schema is a program of a stranger: a few kilobytes can ask for hours of work. So each evaluation of a keyword, each
compared value and each part of a pattern's work counts as a step, and after `MAX_STEPS` steps the check fails. Nothing
is fetched, and patterns run in time linear in the text. A pattern that such a matcher does not support (look-around,
back reference) is ignored, and left to the tool itself. ``format`` is not checked, as the draft has it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Annotated, Any, NamedTuple
from urllib.parse import unquote

import msgspec
from pydantic import StringConstraints, TypeAdapter
from pydantic_core import SchemaError as PatternError
from pydantic_core import ValidationError as PatternMismatch

from infra.errors import InvalidMessage

MAX_BYTES = 32 * 1024
"""Of a schema."""
MAX_STEPS = 100_000
"""Of one check. A step takes about a microsecond."""

Schema = Mapping[str, Any]


def check_schema(field: str, schema: Schema) -> None:
    """Raises InvalidMessage if `schema` is not a JSON Schema of an object, is too large, or needs too much work.

    field: the place of the schema, with which the path in the error begins.
    """
    try:
        encoded = msgspec.json.encode(schema)
        if len(encoded) > MAX_BYTES:
            raise InvalidMessage(field, f"must have at most {MAX_BYTES} bytes")
        _check_schema(field, encoded)
    except UnicodeEncodeError:
        raise InvalidMessage(field, "must be Unicode text") from None
    except RecursionError:
        raise InvalidMessage(field, "is nested too deeply, or refers to itself without an end") from None


@lru_cache(maxsize=256)
def _check_schema(field: str, encoded: bytes) -> None:
    """Cached, because some schemas come with each request."""
    schema = msgspec.json.decode(encoded)
    if schema.get("type") != "object":
        raise InvalidMessage(f"{field}.type", "must be object")
    references = _Check(field, schema)
    for path, keyword, value in _names(schema, field):
        if keyword in _REFUSED:
            raise InvalidMessage(path, "is not supported")
        if keyword == "$ref" and isinstance(value, str):
            if not value.startswith("#"):
                raise InvalidMessage(path, "must refer to a part of the same schema: nothing is fetched")
            references.field = path
            references.resolve(value)
    _check_shape(_Check(field, schema), schema, field)
    # The result does not matter; this finds references without an end.
    _Check(field, schema).first_failure(schema, {}, ())


def check(field: str, schema: Schema, value: Any) -> None:
    """Raises InvalidMessage if `value` does not fit the schema, or if the check takes more than `MAX_STEPS` steps.

    field: the name of the value, with which the path in the error begins (``arguments.items[2].price``).
    """
    try:
        failure = _Check(field, schema).first_failure(schema, value, ())
    except RecursionError:
        raise InvalidMessage(field, "is nested too deeply, or its schema refers to itself without an end") from None
    if failure is None:
        return
    path = list(failure.path)
    rule = msgspec.json.encode(failure.rule).decode()[:300]
    match failure.keyword:
        case "required":
            path.append(next(name for name in failure.rule if name not in failure.value))
            reason = "missing"
        case "additionalProperties" | "unevaluatedProperties":
            known = failure.schema.get("properties", {})
            path += [name for name in failure.value if name not in known][:1]
            reason = "unknown"
        case "false":
            reason = "is not allowed"
        case "type" | "enum":
            reason = f"must be one of {rule}" if rule.startswith("[") else f"must be {failure.rule}"
        case keyword:
            # Not the value itself: it may be a secret.
            reason = f"does not fit {keyword} {rule}"
    raise InvalidMessage(_path(field, path), reason)


class _Failure(NamedTuple):
    """The first keyword that a value does not fit, and the path of the value."""

    path: tuple[str | int, ...]
    keyword: str
    rule: Any
    value: Any
    schema: Schema


class _Check:
    """One application of a schema, with its remaining steps."""

    def __init__(self, field: str, root: Schema) -> None:
        self.field = field
        self._root = root
        self.steps = MAX_STEPS

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            reason = f"the check against its schema takes more than {MAX_STEPS} steps; make the schema or value smaller"
            raise InvalidMessage(self.field, reason)

    def first_failure(self, schema: Any, value: Any, path: tuple[str | int, ...]) -> _Failure | None:
        self.spend(1)
        if isinstance(schema, bool):
            return None if schema else _Failure(path, "false", False, value, {})
        for keyword, rule in schema.items():
            evaluate = _KEYWORDS.get(keyword)
            if evaluate is None:
                continue
            self.spend(1)
            result = evaluate(self, rule, value, schema, path)
            if result is False:
                return _Failure(path, keyword, rule, value, schema)
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
        found = {name for name in schema.get("properties", {}) if name in value}
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
            yield from (part for name, part in schema.get("dependentSchemas", {}).items() if name in value)
        if "if" in schema:
            if self.fits(schema["if"], value):
                yield schema["if"]
                yield schema.get("then", True)
            else:
                yield schema.get("else", True)


def _missing_target(field: str) -> InvalidMessage:
    return InvalidMessage(field, "a $ref of the schema must point to a part of the schema")


# An evaluation returns True if the value fits, False or the failure of a part of it if it does not.
_Result = bool | _Failure
_Path = tuple[str | int, ...]
_Evaluate = Callable[[_Check, Any, Any, Schema, _Path], _Result]


def _ref(check: _Check, ref: str, value: Any, schema: Schema, path: _Path) -> _Result:
    return check.first_failure(check.resolve(ref), value, path) or True


def _type(check: _Check, rule: Any, value: Any, schema: Schema, path: _Path) -> _Result:
    return any(_IS[name](value) for name in ([rule] if isinstance(rule, str) else rule))


def _enum(check: _Check, rule: list[Any], value: Any, schema: Schema, path: _Path) -> _Result:
    wanted = check.canonical(value)
    return any(check.canonical(one) == wanted for one in rule)


def _const(check: _Check, rule: Any, value: Any, schema: Schema, path: _Path) -> _Result:
    return check.canonical(rule) == check.canonical(value)


def _properties(check: _Check, rule: Schema, value: Any, schema: Schema, path: _Path) -> _Result:
    if not isinstance(value, Mapping):
        return True
    check.spend(len(rule) // 16)
    for name, part in rule.items():
        if name in value and (failure := check.first_failure(part, value[name], (*path, name))):
            return failure
    return True


def _required(check: _Check, rule: list[str], value: Any, schema: Schema, path: _Path) -> _Result:
    check.spend(len(rule) // 16)
    return not isinstance(value, Mapping) or all(name in value for name in rule)


def _additional_properties(check: _Check, rule: Any, value: Any, schema: Schema, path: _Path) -> _Result:
    if not isinstance(value, Mapping):
        return True
    check.spend(len(value) // 16)
    known = schema.get("properties", {})
    return _each(check, rule, {name: item for name, item in value.items() if name not in known}, path)


def _each(check: _Check, rule: Any, items: Mapping[str, Any] | Mapping[int, Any], path: _Path) -> _Result:
    if rule is False:
        return not items
    for name, item in items.items():
        if failure := check.first_failure(rule, item, (*path, name)):
            return failure
    return True


def _unevaluated_properties(check: _Check, rule: Any, value: Any, schema: Schema, path: _Path) -> _Result:
    if not isinstance(value, Mapping):
        return True
    others = {name: part for name, part in schema.items() if name != "unevaluatedProperties"}
    known = check.evaluated_properties(others, value)
    return _each(check, rule, {name: item for name, item in value.items() if name not in known}, path)


def _property_names(check: _Check, rule: Any, value: Any, schema: Schema, path: _Path) -> _Result:
    if isinstance(value, Mapping):
        for name in value:
            if failure := check.first_failure(rule, name, path):
                return failure
    return True


def _dependent_required(check: _Check, rule: Schema, value: Any, schema: Schema, path: _Path) -> _Result:
    if not isinstance(value, Mapping):
        return True
    check.spend(sum(map(len, rule.values())) // 16 + len(rule) // 16)
    return all(name not in value or all(other in value for other in others) for name, others in rule.items())


def _dependent_schemas(check: _Check, rule: Schema, value: Any, schema: Schema, path: _Path) -> _Result:
    if isinstance(value, Mapping):
        check.spend(len(rule) // 16)
        for name, part in rule.items():
            if name in value and (failure := check.first_failure(part, value, path)):
                return failure
    return True


def _items(check: _Check, rule: Any, value: Any, schema: Schema, path: _Path) -> _Result:
    if not isinstance(value, list | tuple):
        return True
    check.spend(len(value) // 16)
    first = len(schema.get("prefixItems", ()))
    return _each(check, rule, dict(enumerate(value[first:], first)), path)


def _prefix_items(check: _Check, rule: list[Any], value: Any, schema: Schema, path: _Path) -> _Result:
    if isinstance(value, list | tuple):
        for n, (part, item) in enumerate(zip(rule, value, strict=False)):
            if failure := check.first_failure(part, item, (*path, n)):
                return failure
    return True


def _unevaluated_items(check: _Check, rule: Any, value: Any, schema: Schema, path: _Path) -> _Result:
    if not isinstance(value, list | tuple):
        return True
    others = {name: part for name, part in schema.items() if name != "unevaluatedItems"}
    known = check.evaluated_items(others, value)
    check.spend(len(value) // 16)
    return _each(check, rule, {n: item for n, item in enumerate(value) if n not in known}, path)


def _contains(check: _Check, rule: Any, value: Any, schema: Schema, path: _Path) -> _Result:
    if not isinstance(value, list | tuple):
        return True
    found = sum(check.fits(rule, item) for item in value)
    return bool(schema.get("minContains", 1) <= found <= schema.get("maxContains", len(value)))


def _unique_items(check: _Check, rule: bool, value: Any, schema: Schema, path: _Path) -> _Result:
    if not rule or not isinstance(value, list | tuple):
        return True
    return len(set(map(check.canonical, value))) == len(value)


def _all_of(check: _Check, rule: list[Any], value: Any, schema: Schema, path: _Path) -> _Result:
    for part in rule:
        if failure := check.first_failure(part, value, path):
            return failure
    return True


def _any_of(check: _Check, rule: list[Any], value: Any, schema: Schema, path: _Path) -> _Result:
    return any(check.fits(part, value) for part in rule)


def _one_of(check: _Check, rule: list[Any], value: Any, schema: Schema, path: _Path) -> _Result:
    return sum(check.fits(part, value) for part in rule) == 1


def _not(check: _Check, rule: Any, value: Any, schema: Schema, path: _Path) -> _Result:
    return not check.fits(rule, value)


def _if(check: _Check, rule: Any, value: Any, schema: Schema, path: _Path) -> _Result:
    then = schema.get("then" if check.fits(rule, value) else "else", True)
    return check.first_failure(then, value, path) or True


def _pattern(check: _Check, rule: str, value: Any, schema: Schema, path: _Path) -> _Result:
    if not isinstance(value, str):
        return True
    if rule not in _matchers:
        # Even if it is not compiled: to find its size reads the pattern.
        size = _pattern_size(rule, _COMPILE_WEIGHTS)
        check.spend(_compile_steps(rule) + min(size, MAX_PATTERN_SIZE))
        if len(_matchers) >= 1_000:
            _matchers.clear()
        _matchers[rule] = _matcher(rule, size), _pattern_size(rule, {})
    matcher, positions = _matchers[rule]
    if matcher is None:
        return True
    check.spend(len(value) * positions // 64)
    try:
        matcher.validate_python(value)
    except PatternMismatch:
        return False
    return True


MAX_PATTERN_SIZE = 30_000
"""Of a pattern with its repeats written out, in steps to compile it. A larger pattern is ignored."""
# Steps to compile one occurrence: these classes hold hundreds of ranges.
_COMPILE_WEIGHTS = {"w": 350, "W": 350, "p": 250, "P": 250, "b": 20, "B": 20, "d": 30, "D": 30, "s": 10, "S": 10}
_MATCHER_STEPS = 200
"""To make the matcher of the smallest pattern."""
_CASELESS = re.compile(r"\(\?[A-Za-z-]*i")
_WIDE = re.compile(rf"[^\x00-\xff]|\\[uUN]|{_CASELESS.pattern}")
_matchers: dict[str, tuple[TypeAdapter[str] | None, int]] = {}
_REPEAT = re.compile(r"\{ *(\d{0,9}) *(,?) *(\d{0,9}) *\}")
# In this mode a comment could hide a part of the pattern from `_pattern_size`.
_VERBOSE = re.compile(r"\(\?[A-Za-z-]*x")


def _compile_steps(pattern: str) -> int:
    """Steps to compile a pattern in Python or Rust, without its repeats and escapes. A class beyond Latin-1 becomes a
    table of 65,536 bits in Python, and one without case has each of its characters folded in Rust."""
    class_steps = 1_000 if _WIDE.search(pattern) else 20
    return _MATCHER_STEPS + 6 * len(pattern) + class_steps * pattern.count("[")


def _pattern_size(pattern: str, weights: Mapping[str, int]) -> int:
    """The number of parts of a pattern in Rust's syntax, with its repeats written out. `weights`: sizes of escapes."""
    # `sums`: the sizes of the open groups. `last`: the size of the part to which a repeat applies. `depth`: of classes.
    sums, last, at, depth = [0], 0, 0, 0
    while at < len(pattern):
        character = pattern[at]
        at += 1
        size = 1
        if character == "\\" and at < len(pattern):
            size = weights.get(pattern[at], 1)
            at += 1
        elif character == "[":
            depth += 1
            # A bracket directly after the beginning of a class is a member of it.
            at += pattern.startswith("^", at)
            at += pattern.startswith("]", at)
        elif depth:
            depth -= character == "]"
        elif character == "(":
            sums.append(0)
            continue
        elif character == ")" and len(sums) > 1:
            last = sums.pop()
            sums[-1] += last
            continue
        elif character == "{" and (repeat := _REPEAT.match(pattern, at - 1)):
            times = max(int(repeat[1] or 0) + bool(repeat[2]), int(repeat[3] or 0), 1)
            sums[-1] += last * (times - 1)
            last *= times
            at = repeat.end()
            continue
        # A class is one part, with the sizes of its members.
        begins = character == "[" and depth == 1 if depth else character != "]"
        last = size if begins else last + size
        sums[-1] += size
    return sum(sums)


def _matcher(pattern: str, size: int) -> TypeAdapter[str] | None:
    """pydantic's matcher is Rust's ``regex``, which never backtracks. None if it does not support the pattern."""
    if size > MAX_PATTERN_SIZE or _VERBOSE.search(pattern):
        return None
    try:
        return TypeAdapter(Annotated[str, StringConstraints(pattern=pattern)])
    except PatternError:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return _is_number(value) and (isinstance(value, int) or value.is_integer())


_IS: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": _is_integer,
    "number": _is_number,
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list | tuple),
    "object": lambda value: isinstance(value, Mapping),
}


def _compared(kind: str, size: Callable[[Any], Any], fits: Callable[[Any, Any], bool]) -> _Evaluate:
    """A keyword that compares the size of values of one type with its rule."""
    return lambda check, rule, value, schema, path: not _IS[kind](value) or fits(size(value), rule)


def _multiple_of(check: _Check, rule: Any, value: Any, schema: Schema, path: _Path) -> _Result:
    if not _is_number(value):
        return True
    if isinstance(value, float) and not math.isfinite(value):
        return False
    # Exact, by the decimal text: 0.3 is a multiple of 0.1 for a person, and not as binary fractions.
    number, unit = (Fraction(one) if isinstance(one, int) else Fraction(repr(one)) for one in (value, rule))
    check.spend(_words(number) * _words(unit))
    return number % unit == 0


def _words(number: Fraction) -> int:
    """The size in words of 128 bits; 0 for usual numbers."""
    return (number.numerator.bit_length() + number.denominator.bit_length()) // 128


def _at_most(size: Any, rule: Any) -> bool:
    return bool(size <= rule)


def _at_least(size: Any, rule: Any) -> bool:
    return bool(size >= rule)


_KEYWORDS: dict[str, _Evaluate] = {
    "$ref": _ref,
    "type": _type,
    "enum": _enum,
    "const": _const,
    "properties": _properties,
    "required": _required,
    "additionalProperties": _additional_properties,
    "unevaluatedProperties": _unevaluated_properties,
    "propertyNames": _property_names,
    "dependentRequired": _dependent_required,
    "dependentSchemas": _dependent_schemas,
    "items": _items,
    "prefixItems": _prefix_items,
    "unevaluatedItems": _unevaluated_items,
    "contains": _contains,
    "uniqueItems": _unique_items,
    "allOf": _all_of,
    "anyOf": _any_of,
    "oneOf": _one_of,
    "not": _not,
    "if": _if,
    "pattern": _pattern,
    "multipleOf": _multiple_of,
    "minimum": _compared("number", lambda value: value, _at_least),
    "maximum": _compared("number", lambda value: value, _at_most),
    "exclusiveMinimum": _compared("number", lambda value: value, lambda size, rule: bool(size > rule)),
    "exclusiveMaximum": _compared("number", lambda value: value, lambda size, rule: bool(size < rule)),
    "minLength": _compared("string", len, _at_least),
    "maxLength": _compared("string", len, _at_most),
    "minItems": _compared("array", len, _at_least),
    "maxItems": _compared("array", len, _at_most),
    "minProperties": _compared("object", len, _at_least),
    "maxProperties": _compared("object", len, _at_most),
}

# Python's matcher would run the patterns of `patternProperties`, and one bad pattern stops it for minutes.
_REFUSED = ("$dynamicRef", "$recursiveRef", "patternProperties")

# The shapes of keywords, as in the metaschema.
_ONE_SCHEMA = (
    *("items", "contains", "additionalProperties", "propertyNames", "if", "then", "else", "not"),
    *("unevaluatedItems", "unevaluatedProperties", "contentSchema"),
)
_SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SCHEMA_MAPS = ("properties", "$defs", "definitions", "dependentSchemas")
_COUNTS = (
    *("maxLength", "minLength", "maxItems", "minItems", "maxContains", "minContains", "maxProperties"),
    "minProperties",
)
_NUMBERS = ("maximum", "minimum", "exclusiveMaximum", "exclusiveMinimum")
_BOOLEANS = ("uniqueItems", "deprecated", "readOnly", "writeOnly")
_STRINGS = (
    *("$id", "$schema", "$ref", "$anchor", "$comment", "title", "description", "format", "pattern"),
    *("contentEncoding", "contentMediaType"),
)


def _check_shape(check: _Check, schema: Any, path: str) -> None:
    """Raises InvalidMessage naming the first keyword whose value does not have its shape."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise InvalidMessage(path, "must be a schema: an object, true or false")
    for keyword, value in schema.items():
        here = f"{path}.{keyword}"
        if keyword in _ONE_SCHEMA:
            _check_shape(check, value, here)
        elif keyword in _SCHEMA_LISTS:
            _must(isinstance(value, list) and value, here, "must be a list of schemas that is not empty")
            for n, part in enumerate(value):
                _check_shape(check, part, f"{here}[{n}]")
        elif keyword in _SCHEMA_MAPS:
            _must(isinstance(value, Mapping), here, "must be an object of schemas")
            for name, part in value.items():
                _check_shape(check, part, f"{here}.{name}")
        elif keyword == "type":
            names = value if isinstance(value, list) and value else [value]
            fits = all(isinstance(name, str) and name in _IS for name in names) and len(set(names)) == len(names)
            _must(fits, here, f"must be one or several of {', '.join(_IS)}")
        elif keyword == "required":
            _must(_are_names(value), here, "must be a list of different names")
        elif keyword == "dependentRequired":
            fits = isinstance(value, Mapping) and all(map(_are_names, value.values()))
            _must(fits, here, "must be an object of lists of names")
        elif keyword in ("enum", "examples"):
            _must(isinstance(value, list), here, "must be a list")
        elif keyword in _COUNTS:
            _must(_is_integer(value) and value >= 0, here, "must be an integer from 0")
        elif keyword in _NUMBERS:
            _must(_is_number(value), here, "must be a number")
        elif keyword == "multipleOf":
            _must(_is_number(value) and value > 0, here, "must be a number above 0")
        elif keyword in _BOOLEANS:
            _must(isinstance(value, bool), here, "must be true or false")
        elif keyword in _STRINGS:
            _must(isinstance(value, str), here, "must be a text")
            if keyword == "pattern":
                _check_pattern(check, here, value)


def _check_pattern(check: _Check, path: str, pattern: str) -> None:
    """Raises InvalidMessage if neither Python nor Rust can read the pattern."""
    check.spend(_compile_steps(pattern))
    # Python's compiler takes a second for a large class without case.
    if not _CASELESS.search(pattern):
        try:
            re.compile(pattern)
            return
        except (re.error, OverflowError):
            pass
    size = _pattern_size(pattern, _COMPILE_WEIGHTS)
    _must(size <= 2_000 and _matcher(pattern, size), path, "must be a regular expression")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len(set(value)) == len(value)


def _must(fits: object, path: str, reason: str) -> None:
    if not fits:
        raise InvalidMessage(path, reason)


def _names(schema: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """Every name and value in the schema. These are more than its keywords (a property may be called ``$ref``), so the
    check is only stricter."""
    if isinstance(schema, Mapping):
        for name, value in schema.items():
            yield f"{path}.{name}", name, value
            yield from _names(value, f"{path}.{name}")
    elif isinstance(schema, list):
        for n, value in enumerate(schema):
            yield from _names(value, f"{path}[{n}]")


def _path(field: str, path: Iterable[str | int]) -> str:
    return field + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
