"""The JSON Schema of a tenant is applied, and its check has a bounded number of steps."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from infra.errors import InvalidMessage
from infra.web.json_schema import MAX_STEPS, StepBudget, check, check_schema
from infra.web.json_schema.evaluation import Check
from infra.web.json_schema.keywords import KEYWORDS
from infra.web.json_schema.patterns import pattern_size

OBJECT: dict[str, Any] = {"type": "object"}


@pytest.mark.parametrize(
    ("schema", "arguments", "field"),
    [
        ({"required": ["to"]}, {}, "arguments.to"),
        ({"properties": {"to": {"type": "string"}}}, {"to": 1}, "arguments.to"),
        ({"properties": {"to": {}}, "additionalProperties": False}, {"to": 1, "cc": 2}, "arguments.cc"),
        (
            {"properties": {"items": {"items": {"properties": {"price": {"minimum": 0}}}}}},
            {"items": [{"price": 1}, {"price": -1}]},
            "arguments.items[1].price",
        ),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"enum": [1]}}}, {"a": 2}, "arguments.a"),
        ({"properties": {"code": {"pattern": "^[A-Z]{3}$"}}}, {"code": "abc"}, "arguments.code"),
        ({"properties": {"name": {"pattern": "^\\p{L}+$"}}}, {"name": "a1"}, "arguments.name"),
    ],
)
def test_a_value_that_does_not_fit_is_named(schema: dict[str, Any], arguments: dict[str, Any], field: str) -> None:
    check_schema("schema", OBJECT | schema)
    with pytest.raises(InvalidMessage) as refused:
        check("arguments", OBJECT | schema, arguments)
    assert refused.value.field == field


def test_the_root_may_refer_to_the_schema_of_an_object() -> None:
    node = OBJECT | {"properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}
    for definitions in ({"node": node}, {"all": {"$ref": "#/$defs/node"}, "node": node}):
        schema = {"$ref": f"#/$defs/{next(iter(definitions))}", "$defs": definitions}
        check_schema("schema", schema)
        check("answer", schema, {"next": {"next": None}})
        with pytest.raises(InvalidMessage) as refused:
            check("answer", schema, {"next": {"next": 5}})
        assert refused.value.field == "answer.next"


def test_the_error_does_not_show_the_value() -> None:
    with pytest.raises(InvalidMessage) as refused:
        check("arguments", OBJECT | {"properties": {"card": {"maxLength": 3}}}, {"card": "4111-1111"})
    assert "4111" not in str(refused.value)


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "field"),
    [
        ({"type": "string"}, "schema.type"),
        ({"$ref": "#/$defs/text", "$defs": {"text": {"type": "string"}}}, "schema.type"),
        ({"$ref": "#/$defs/any", "$defs": {"any": True}}, "schema.type"),
        ({"$ref": "#/$defs/none", "$defs": {}}, "schema.$ref"),
        ({"$ref": "http://127.0.0.1/s"}, "schema.$ref"),
        ({"$ref": "#"}, "schema"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "schema"),
        ({"type": "object", "properties": {"a": {"type": "strin"}}}, "schema.properties.a.type"),
        ({"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1/s"}}}, "schema.properties.a.$ref"),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}}, "schema.properties.a.$ref"),
        ({"type": "object", "allOf": [{"$ref": "#"}]}, "schema"),
        ({"type": "object", "patternProperties": {"(a+)+$": {}}}, "schema.patternProperties"),
        ({"type": "object", "$dynamicRef": "#x"}, "schema.$dynamicRef"),
        ({"type": "object", "properties": {"a": {"pattern": "("}}}, "schema.properties.a.pattern"),
        ({"type": "object", "description": "x" * 40_000}, "schema"),
        ({"type": "object", "properties": {"a": nested(3_000)}}, "schema"),
        ({"type": "object", "title": "\ud800"}, "schema"),
        ({"type": "object", "default": {"multipleOf": 0}, "$ref": "#/default"}, "schema.$ref.multipleOf"),
        ({"type": "object", "enum": [{"minimum": "x"}], "not": {"$ref": "#/enum/0"}}, "schema.not.$ref.minimum"),
        ({"type": "object", "const": {"allOf": 5}, "not": {"$ref": "#/const"}}, "schema.not.$ref.allOf"),
        ({"type": "object", "x": {"type": "frob"}, "not": {"$ref": "#/x"}}, "schema.not.$ref.type"),
        ({"type": "object", "x": {"$anchor": "x", "required": 7}, "not": {"$ref": "#x"}}, "schema.not.$ref.required"),
        ({"type": "object", "x": {"pattern": "("}, "not": {"$ref": "#/x"}}, "schema.not.$ref.pattern"),
    ],
)
def test_an_invalid_or_too_large_schema_is_refused(schema: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidMessage) as refused:
        check_schema("schema", schema)
    assert refused.value.field == field


def test_a_pattern_that_would_backtrack_is_linear() -> None:
    schema = OBJECT | {"properties": {"a": {"pattern": "^(a+)+$"}}}
    check_schema("schema", schema)
    with pytest.raises(InvalidMessage, match="does not fit pattern"):
        check("arguments", schema, {"a": "a" * 5_000 + "b"})


DOUBLING: dict[str, Any] = {
    **{f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)},
    "d40": {},
}


def cubed(part: dict[str, Any], keyword: str, names: Any) -> dict[str, Any]:
    """`part` under $defs, and `a` that applies it 8,000 times by the keyword."""

    def twenty(name: str) -> dict[str, Any]:
        references = [{"$ref": f"#/$defs/{name}"}] * 20
        return {keyword: dict(zip(names, references, strict=True)) if names else references}

    return {"$defs": {"x": part, "y": twenty("x"), "z": twenty("y")}, "properties": {"a": twenty("z")}}


def unevaluated(part: dict[str, Any]) -> dict[str, Any]:
    schema = cubed(part, "dependentSchemas", KEYS)
    return schema | {"properties": {"a": {"unevaluatedProperties": False, **schema["properties"]["a"]}}}


KEYS = "abcdefghijklmnopqrst"
# A schema, and a value for which its check would take more than the steps allowed.
ATTACKS: dict[str, tuple[dict[str, Any], Any]] = {
    "a list that is referenced often": (
        {"$defs": {"a": {"allOf": [{}] * 1_500}}, "properties": {"a": {"allOf": [{"$ref": "#/$defs/a"}] * 150}}},
        1,
    ),
    "references that double at each level": ({"$defs": DOUBLING, "properties": {"a": {"$ref": "#/$defs/d0"}}}, 1),
    "doubling below unevaluatedProperties": (
        {"$defs": DOUBLING, "properties": {"a": {"unevaluatedProperties": False, "$ref": "#/$defs/d0"}}},
        {"x": 1},
    ),
    "doubling below unevaluatedItems": (
        {"$defs": DOUBLING, "properties": {"a": {"unevaluatedItems": False, "$ref": "#/$defs/d0"}}},
        [1],
    ),
    "items times allOf": ({"properties": {"a": {"items": {"allOf": [{}] * 1_000}}}}, [1] * 1_000),
    "items times enum": ({"properties": {"a": {"items": {"not": {"enum": list(range(1_000))}}}}}, [-1] * 1_000),
    "items times required": (
        {"properties": {"a": {"items": {"required": [str(n) for n in range(1_600)]}}}},
        [{str(n): 0 for n in range(1_600)}] * 1_000,
    ),
    "items times properties": (
        {"properties": {"a": {"items": {"properties": {str(n): {} for n in range(1_600)}}}}},
        [{}] * 1_000,
    ),
    "values times const": ({"properties": {"a": {"items": {"const": [0] * 1_000}}}}, [[0] * 1_000] * 1_000),
    "anchors": (
        {"properties": {"a": {"items": {"$ref": "#z"}}}, "$defs": {"y": [{}] * 5_000, "z": {"$anchor": "z"}}},
        [1] * 100,
    ),
    "a pattern with nested repeats": ({"properties": {"a": {"pattern": "(a{1,100}){1,100}b"}}}, "a" * 10_000),
    "a pattern for many items": ({"properties": {"a": {"items": {"pattern": "a{1,100}b|."}}}}, ["a" * 1_000] * 1_000),
    "a long name times const": (
        {"$defs": {"a": {"not": {"const": 1}}}, "properties": {"a": {"allOf": [{"$ref": "#/$defs/a"}] * 1_500}}},
        {"x" * 100_000: 1},
    ),
    "large numbers times const": (
        {"properties": {"a": {"items": {"allOf": [{"not": {"const": 1}}] * 500}}}},
        [10**4_000] * 20,
    ),
    "large numbers times multipleOf": (
        {"properties": {"a": {"items": {"allOf": [{"not": {"multipleOf": 10**2_000 - 1}}] * 10}}}},
        [10**4_000] * 10,
    ),
    "references with many escapes": (
        {"properties": {"a": {"items": {"$ref": "#/$defs/" + "%41" * 1_000}}}, "$defs": {"A" * 1_000: {}}},
        [1] * 1_000,
    ),
    "many patterns": ({"properties": {"a": {"anyOf": [{"pattern": f"b{n}"} for n in range(600)]}}}, "a"),
    "unknown keywords": (cubed({f"k{n}": 0 for n in range(3_000)}, "allOf", None), 1),
    "names below unevaluatedProperties": (
        unevaluated({"properties": {f"k{n}": {} for n in range(2_000)}}),
        dict.fromkeys(KEYS),
    ),
    "conditions below unevaluatedProperties": (
        unevaluated({"dependentSchemas": {f"k{n}": {} for n in range(2_000)}}),
        dict.fromkeys(KEYS),
    ),
    "a large value": ({"properties": {"a": {"items": {"type": "integer"}}}}, [1] * MAX_STEPS),
    "unique items": ({"properties": {"a": {"uniqueItems": True}}}, list(range(MAX_STEPS))),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_check_ends_after_so_many_steps(attack: str) -> None:
    schema, value = ATTACKS[attack]
    with pytest.raises(InvalidMessage, match="takes more than 100000 steps") as refused:
        check("arguments", OBJECT | schema, {"a": value})
    assert refused.value.field == "arguments"


def test_a_schema_that_asks_for_too_much_without_a_value_is_refused_when_it_is_set_up() -> None:
    schema = OBJECT | {"$defs": {"a": {"allOf": [{}] * 1_500}}, "allOf": [{"$ref": "#/$defs/a"}] * 150}
    with pytest.raises(InvalidMessage, match="takes more than 100000 steps"):
        check_schema("schema", schema)
    anchors = {f"p{n}": {"$ref": "#z"} for n in range(1_000)}
    with pytest.raises(InvalidMessage, match="takes more than 100000 steps"):
        check_schema("schema", OBJECT | {"properties": anchors, "$defs": {"z": {"$anchor": "z"}}})
    # A large part within others, and a reference to each of them.
    part: dict[str, Any] = {"allOf": [{}] * 4_000}
    targets = ["#/properties/a"]
    for _ in range(40):
        part = {"not": part}
        targets.append(f"{targets[-1]}/not")
    properties = {"a": part, **{f"p{n}": {"$ref": target} for n, target in enumerate(targets)}}
    with pytest.raises(InvalidMessage, match="takes more than 100000 steps"):
        check_schema("schema", OBJECT | {"properties": properties})


def test_several_schemas_share_a_budget_also_if_one_was_checked_before() -> None:
    schema = OBJECT | {"properties": {"a": {"allOf": [{}] * 1_000}}}
    budget = StepBudget()
    check_schema("schema", schema, budget)
    one = StepBudget().steps - budget.steps
    assert one >= 1_000
    budget.steps = one + 1
    check_schema("schema", schema, budget)
    check_schema("schema", schema, budget)
    with pytest.raises(InvalidMessage, match="the schemas before it"):
        check_schema("schema", schema, budget)
    check_schema("schema", schema)


SLOW = ("check", "check_schema", "check_config", "checked_plugin", "checked_tools")


def test_no_coroutine_checks_a_schema_on_the_event_loop() -> None:
    found = []
    for path in Path("services").rglob("*.py"):
        for function in ast.walk(tree := ast.parse(path.read_text())):
            if isinstance(function, ast.AsyncFunctionDef):
                calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
                found += [
                    f"{path}: {call.id}" for call in calls if isinstance(call, ast.Name) and call.id in _slow(tree)
                ]
    assert found == []


def _slow(tree: ast.Module) -> set[str]:
    """The names that the module imports, and with which it would check schemas."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules = ("infra.web.json_schema", "services.plugin.manifest")
    return {name.name for node in imports if node.module in modules for name in node.names} & set(SLOW)


@pytest.mark.parametrize("classes", ["[ĀĂĄĆ]", r"[\u0100\u0300-\u0400\u0500]", "(?i:[Ā-✀])"])
def test_a_schema_whose_patterns_ask_for_too_much_is_refused_when_it_is_set_up(classes: str) -> None:
    check_schema("schema", OBJECT | {"properties": {"a": {"pattern": classes * 20}}})
    with pytest.raises(InvalidMessage, match="takes more than 100000 steps"):
        check_schema("schema", OBJECT | {"properties": {f"p{n}": {"pattern": classes * 20} for n in range(5)}})


def test_colliding_numbers_cost_no_more_than_others() -> None:
    # Python's hash of a number is its rest by this prime, so all of these have one hash.
    same_hash = [n * (2**61 - 1) for n in range(5_000)]
    steps = []
    for values in (same_hash, list(range(5_000))):
        applied = Check("a", {}, KEYWORDS)
        assert applied.fits({"uniqueItems": True}, values)
        steps.append(MAX_STEPS - applied.steps)
    assert steps[0] == steps[1]


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("abc", 3),
        ("a{10}", 10),
        ("a{2,10}b", 11),
        ("a{10,}", 11),
        ("a{,10}", 10),
        ("a{ 10 }", 10),
        ("(ab{10}){10}", 110),
        ("((a{10}){10}){10}", 1_000),
        ("a{10}{10}", 100),
        ("[abc]{10}", 10),
        (r"[]()]{10}", 10),
        (r"[^](]{10}x", 11),
        (r"[[:alpha:](]{10}", 10),
        (r"\({10}", 10),
        (r"[\]]{10}", 10),
        ("a{x}", 4),
    ],
)
def test_the_size_of_a_pattern_counts_its_repeats(pattern: str, parts: int) -> None:
    # A class counts its members, and so too much.
    assert parts <= pattern_size(pattern, {}) <= (15 if "[" in pattern else 1) * parts


@pytest.mark.parametrize("hidden", ["(?x)#[\n(a{1,100}){1,100}b", "(?ix)#[\n(a{1,100}){1,100}b", r"\w{1,20000}"])
def test_a_pattern_with_a_size_that_cannot_be_known_or_is_too_large_is_ignored(hidden: str) -> None:
    check("arguments", OBJECT | {"properties": {"a": {"pattern": hidden}}}, {"a": "a" * 100_000})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", 10**1_000, 1e308])
@pytest.mark.parametrize("rule", [{"enum": [1, "a"]}, {"const": 1}, {"multipleOf": 0.1}, {"uniqueItems": True}])
def test_odd_values_do_not_fail_the_check(rule: dict[str, Any], value: Any) -> None:
    for odd in (value, [value, value]):
        with suppress(InvalidMessage):
            check("arguments", OBJECT | {"properties": {"a": rule}}, {"a": odd})


names = st.sampled_from(["a", "b", "c"])
small = st.integers(0, 3)
scalars = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([0.5, 1.0, 2.5]), names)
values = st.recursive(
    scalars, lambda one: st.lists(one, max_size=3) | st.dictionaries(names, one, max_size=3), max_leaves=6
)
types = st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"])


def keywords(part: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    some = st.lists(part, min_size=1, max_size=3)
    each = st.dictionaries(names, part, max_size=3)
    rules: dict[str, st.SearchStrategy[Any]] = {
        "type": types | st.lists(types, min_size=1, max_size=2, unique=True),
        "enum": st.lists(values, max_size=3),
        "const": values,
        "properties": each,
        "required": st.lists(names, max_size=2, unique=True),
        "additionalProperties": part,
        "propertyNames": part,
        "dependentRequired": st.dictionaries(names, st.lists(names, max_size=2, unique=True), max_size=2),
        "dependentSchemas": each,
        "items": part,
        "prefixItems": some,
        "contains": part,
        "minContains": small,
        "maxContains": small,
        "uniqueItems": st.booleans(),
        "allOf": some,
        "anyOf": some,
        "oneOf": some,
        "not": part,
        "if": part,
        "then": part,
        "else": part,
        "multipleOf": st.sampled_from([1, 2, 0.5]),
        "minimum": st.integers(-2, 2),
        "exclusiveMaximum": st.integers(-2, 2),
        "minLength": small,
        "maxItems": small,
        "minProperties": small,
        "pattern": st.sampled_from(["^a", "b$", "[ab]"]),
        "unevaluatedProperties": part,
        "unevaluatedItems": part,
        "$ref": st.sampled_from(["#/$defs/x", "#/$defs/y"]),
    }
    return st.fixed_dictionaries({}, optional=rules)


schemas = st.recursive(st.booleans() | keywords(st.booleans()), keywords, max_leaves=4)


@settings(max_examples=200)
@given(schemas, schemas, st.dictionaries(names, values, max_size=3))
def test_a_value_fits_if_it_fits_by_the_reference(schema: Any, x: Any, value: dict[str, Any]) -> None:
    whole = {"allOf": [schema], "$defs": {"x": _without_references(x), "y": {"type": "object"}}}
    failures = list(jsonschema.Draft202012Validator(whole).iter_errors(value))
    expected = failures[0] if failures else None
    failure = Check("value", whole, KEYWORDS).first_failure(whole, value, ())
    assert (failure is None) == (expected is None)
    # The reference loses a part of the path if the schema there is `false`, and below unevaluatedProperties.
    if failure and expected and expected.schema is not False and "unevaluated" not in str(expected.validator):
        # The reference reports the members of an object in no fixed order.
        assert list(failure.path) in [list(error.absolute_path) for error in failures]


def _without_references(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {name: _without_references(part) for name, part in schema.items() if name != "$ref"}
    if isinstance(schema, list):
        return [_without_references(part) for part in schema]
    return schema


junk = st.one_of(values, schemas, st.lists(st.text(max_size=2), max_size=2), st.just({}), st.just([]))


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(sorted(jsonschema.Draft202012Validator.VALIDATORS)), junk, max_size=3))
def test_a_schema_is_refused_if_the_metaschema_refuses_it(keywords: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": {"a": keywords}}
    assume(not {"$ref", "$dynamicRef", "patternProperties", "pattern", "format"} & set(map(str, _all_names(keywords))))
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
        fits = True
    except jsonschema.SchemaError:
        fits = False
    try:
        check_schema("schema", schema)
        assert fits
    except InvalidMessage:
        assert not fits


def _all_names(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        yield from schema
        for part in schema.values():
            yield from _all_names(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from _all_names(part)
