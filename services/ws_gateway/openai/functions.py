"""The client's functions, and the schema that it wants the answer to fit."""

from __future__ import annotations

from typing import Any

import msgspec

from infra.errors import InvalidMessage
from infra.web.json_schema import StepBudget, check_schema
from infra.web.json_schema.drafts import adapted
from services.ws_gateway.openai.conversation import ClientFunction
from services.ws_gateway.openai.errors import invalid_field
from services.ws_gateway.openai.fields import check, check_name, list_of, string

MAX_TOOLS = 128
# The most bytes of all tools' parameters together.
MAX_PARAMETERS = 128 * 1024
# Of a choice. ``any`` is Mistral's and Anthropic's word for ``required``. Anthropic's API has the word in an object,
# and the type ``tool`` for a name; that of TGI has a name alone.
_MODES = ("auto", "none", "required", "any")


def tools_of(
    given: Any, choice: Any, *, nested: str = "", fields: tuple[str, str] = ("tools", "tool_choice")
) -> tuple[tuple[ClientFunction, ...], bool]:
    """The functions to offer, and whether one of them must be called. `fields`: the names of `given` and `choice`."""
    name, choice_name = fields
    tools = list_of(given, name)
    check(len(tools) <= MAX_TOOLS, name, f"must be {MAX_TOOLS} at most")
    found: dict[str, ClientFunction] = {}
    size, budget = 0, StepBudget()
    for n, each in enumerate(tools):
        function, where = function_of(each, f"{name}[{n}]", nested)
        check_name(function.get("name"), f"{where}.name")
        check(function["name"] not in found, f"{where}.name", "is there twice")
        strict = function.get("strict") or False
        check(isinstance(strict, bool), f"{where}.strict", "must be true or false")
        # Anthropic's name of the field: clients that take one form for the other send it, too.
        given_name = "input_schema" if "input_schema" in function else "parameters"
        parameters = _parameters(function.get(given_name), f"{where}.{given_name}")
        if strict:
            parameters = _schema(parameters, f"{where}.parameters", budget)
        description = string(function.get("description") or "", f"{where}.description")
        tool = ClientFunction(function["name"], description, parameters, strict)
        size += len(msgspec.json.encode(tool.parameters))
        check(size <= MAX_PARAMETERS, name, f"must have {MAX_PARAMETERS} bytes of parameters at most")
        found[tool.name] = tool
    if isinstance(choice, dict) and choice.get("type") in _MODES:
        choice = choice["type"]
    match choice:
        case None | "auto":
            return tuple(found.values()), False
        case "none":
            return (), False
        case "required" | "any":
            check(bool(found), choice_name, "there are no tools")
            return tuple(found.values()), True
        case {"type": "allowed_tools"}:
            allowed, where = _fields(choice, choice_name, "allowed_tools", nested and "allowed_tools")
            check(allowed.get("mode") in ("auto", "required"), f"{where}.mode", "must be auto or required")
            names = list_of(allowed.get("tools"), f"{where}.tools")
            tools = [_chosen(one, f"{where}.tools[{n}]", nested, found) for n, one in enumerate(names)]
            check(bool(tools), f"{where}.tools", "must not be empty")
            return tuple(tools), allowed["mode"] == "required"
        case str() if choice in found:
            return (found[choice],), True
        case dict():
            # Only the chosen function is offered, so the model must call it.
            given = choice | {"type": "function"} if choice.get("type") == "tool" else choice
            return (_chosen(given, choice_name, nested, found),), True
    raise invalid_field(choice_name, "must be none, auto, required or a function")


def _chosen(given: Any, where: str, nested: str, found: dict[str, ClientFunction]) -> ClientFunction:
    function, where = function_of(given, where, nested)
    name = function.get("name")
    if not isinstance(name, str) or name not in found:
        raise invalid_field(f"{where}.name", "is none of the tools")
    return found[name]


def _parameters(given: Any, where: str) -> dict[str, Any]:
    """The schema of a function's arguments. Clients write a function without parameters in many ways.

    Unless the function is strict, its schema goes to the model as it is: clients send older drafts of JSON Schema, and
    any keyword.
    """
    given = {} if given is None else given
    check(isinstance(given, dict), where, "must be a JSON Schema of an object")
    parameters = {name: value for name, value in given.items() if value is not None}
    check(parameters.setdefault("type", "object") == "object", f"{where}.type", "must be object")
    parameters.setdefault("properties", {})
    try:
        msgspec.json.encode(parameters)
    except RecursionError:
        raise invalid_field(where, "must not be nested so deeply") from None
    except UnicodeEncodeError:
        raise invalid_field(where, "must be valid Unicode text") from None
    return parameters


def function_of(given: Any, where: str, nested: str) -> tuple[dict[str, Any], str]:
    """The fields of a function, and their place in the request."""
    check(isinstance(given, dict), where, "must be an object")
    # Some clients omit it, as other servers do.
    check(given.get("type") in (None, "function"), f"{where}.type", "only function is supported")
    return _fields(given, where, "function", nested)


def _fields(given: dict[str, Any], where: str, name: str, nested: str) -> tuple[dict[str, Any], str]:
    """The fields of the object, and their place: in its field `name`, or beside its type. Clients mix up the forms of
    the two APIs. `nested`: the field that must have them if neither form is there; may be empty."""
    fields = given.get(name)
    if isinstance(fields, dict):
        return fields, f"{where}.{name}"
    if nested and "name" not in given and "mode" not in given:
        raise invalid_field(f"{where}.{nested}", "must be an object")
    return given, where


def output_schema(format_: Any, where: str, *, nested: str = "") -> dict[str, Any] | None:
    """The schema that the format requires; None for any text. `nested` is the field that has the json_schema."""
    if format_ is None:
        return None
    check(isinstance(format_, dict), where, "must be an object")
    match format_.get("type"):
        case "text":
            return None
        case "json_object":
            return {"type": "object"}
        case "json_schema":
            given = format_
            if nested:
                given, where = format_.get(nested), f"{where}.{nested}"
                check(isinstance(given, dict), where, "must be an object")
            check_name(given.get("name"), f"{where}.name")
            is_strict = given.get("strict") is True
            return _schema(given.get("schema"), f"{where}.schema", StepBudget(), strict=is_strict)
    raise invalid_field(f"{where}.type", "must be text, json_object or json_schema")


def _schema(schema: Any, where: str, budget: StepBudget, *, strict: bool = True) -> dict[str, Any]:
    """`strict`: False if the schema may be of an older draft, and have keywords that the check does not support."""
    check(isinstance(schema, dict), where, "must be a JSON Schema of an object")
    try:
        schema = schema if strict else adapted(where, schema)
        check_schema(where, schema, budget)
    except InvalidMessage as error:
        raise invalid_field(error.field, error.reason) from None
    return dict(schema)
