"""Reads tool calls that a model has written as text. Pure.

A server without a parser for the model passes its calls on as the text of the answer. The forms are those of Hermes and
Qwen, Qwen3-Coder, Llama 3, Mistral, DeepSeek, Kimi K2, GLM-4.5 and MiniMax M2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import msgspec

from services.agent.models.contract import Tool
from services.agent.models.stops import Stops

_TAGS = re.compile("</?(?:tool_call|minimax:tool_call|function_calls)>")
_FUNCTION = re.compile(
    r'\s*<(?:function=|invoke name=")([^<>"\s]+)"?>(.*?)</(?:function|invoke)>(?=\s*(?:<function=|<invoke |\Z))\s*',
    re.DOTALL,
)
_PARAMETER = re.compile(
    r'\s*<parameter(?:=| name=")([^<>"\s]+)"?(?: string="[a-z]+")?>\n?(.*?)\n?</parameter>'
    r"(?=\s*(?:<parameter[= ]|\Z))\s*",
    re.DOTALL,
)
_PAIR = re.compile(r"\s*<arg_key>([^<>]+)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)
_BETWEEN = re.compile(r"[\s;]*")
# Calls of an answer, or parameters of a call. Each looks into the schema, and both are a tenant's.
_MOST = 200
# As models write them that were trained on Python.
_CONSTANTS = {"True": True, "False": False, "None": None}
# The ends of answers, which some servers pass on.
_ENDS = ("<｜end▁of▁sentence｜>", "</s>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>")


class WrittenCall(NamedTuple):
    """A call as the model writes it."""

    name: str
    arguments: dict[str, Any]


class _Object(msgspec.Struct, frozen=True):
    """A call as JSON. Llama 3 writes ``parameters``."""

    name: str
    arguments: dict[str, Any] | None = None
    parameters: dict[str, Any] | None = None


class _BareObject(_Object, frozen=True, forbid_unknown_fields=True):
    """A call without a mark. With other fields, it is an answer in JSON."""

    type: Literal["function"] = "function"
    id: str = ""


def taken(text: str, tools: Mapping[str, Tool], *, bare: bool) -> tuple[str, list[WrittenCall]]:
    """The text before the calls at its end, and these calls. Raises ValueError if it begins as a call of one of the
    tools and is none.

    tools: those that are offered, by their names. bare: an answer that is nothing but the JSON of calls is read, too.
    """
    if not tools:
        return text, []
    if bare and text.lstrip().startswith("{"):
        with suppress(ValueError):
            return "", _offered(_read(_objects, text, _BareObject), tools)
    at = min((at for form in _FORMS if (at := text.find(form)) >= 0), default=-1)
    if at < 0:
        return text, []
    before, written = text[:at].rstrip(), _without_end(text[at:])
    form, read = next((form, read) for form, read in _FORMS.items() if written.startswith(form))
    try:
        calls = _offered(_read(read, written, tools), tools)
    except ValueError:
        if not before and _is_meant(_TAGS.sub("", written.removeprefix(form)), form, tools):
            raise
        calls = []
    # Else it is an answer about calls.
    is_call = calls and not before.count("```") % 2
    return (before, calls) if is_call else (text, [])


class BeforeCalls:
    """The part of a text that is known to be before calls, for a text that comes in pieces; see `taken`."""

    def __init__(self, tools: Mapping[str, Tool], *, bare: bool) -> None:
        self._stops = Stops(tuple(_FORMS) if tools else ())
        self._beginnings = [
            f'{{{type_}"name":"{name}"' for type_ in ("", '"type":"function",') for name in tools if bare
        ]
        """Of calls without a mark, without white space. Empty once the text has another beginning."""
        self._held: list[str] = []
        self._compact = ""
        """The text so far without white space."""
        self._is_over = False

    def feed(self, piece: str) -> str:
        """The further part."""
        if self._is_over:
            return ""
        if self._beginnings:
            self._held.append(piece)
            self._compact += "".join(piece.split())
            self._is_over = self._compact.startswith(tuple(self._beginnings))
            if self._is_over or any(one.startswith(self._compact) for one in self._beginnings):
                return ""
            piece, self._beginnings = "".join(self._held), []
        return self._stops.feed(piece)


def _read(read: Callable[..., list[WrittenCall]], *arguments: object) -> list[WrittenCall]:
    try:
        return read(*arguments)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError("a call is malformed") from error


def _offered(calls: list[WrittenCall], tools: Mapping[str, Tool]) -> list[WrittenCall]:
    if not calls or not all(call.name in tools for call in calls):
        raise ValueError("no tool that is offered")
    return calls


def _is_meant(rest: str, form: str, tools: Mapping[str, Tool]) -> bool:
    """True if the text after the mark names one of the tools as calls do, or if there is none: prose about the mark is
    an answer."""
    names = "|".join(map(re.escape, sorted(tools, key=len, reverse=True)))
    return not rest.strip() or re.search(rf'(?:["=.]|[>\]]\s*)(?:{names})(?![\w-])', form + rest) is not None


def _without_end(text: str) -> str:
    text = text.rstrip()
    for end in _ENDS:
        text = text.removesuffix(end).rstrip()
    return text


def _tagged(text: str, tools: Mapping[str, Tool]) -> list[WrittenCall]:
    between, calls = (_TAGS.split(text.replace("｜DSML｜", ""))[first::2] for first in (0, 1))
    if any(map(str.strip, between)):
        raise ValueError("the text has more than calls")
    found: list[WrittenCall] = []
    for call in calls:
        start = call.lstrip()
        if start.startswith("{"):
            found.append(_call(msgspec.json.decode(call, type=_Object)))
        elif start.startswith(("<function=", "<invoke ")):
            found += _functions(start, tools)
        else:
            # GLM writes the name on a line, and then keys and values.
            name, mark, rest = call.partition("<arg_key>")
            if "\n" not in name:
                raise ValueError("a call is malformed")
            found.append(WrittenCall(name.strip(), _values(_PAIR, mark + rest, tools.get(name.strip()))))
    return found


def _functions(text: str, tools: Mapping[str, Tool]) -> list[WrittenCall]:
    # Qwen3-Coder omits the tag that opens the call at times.
    text = text.rstrip().removesuffix("</tool_call>")
    return [WrittenCall(one[1], _arguments(one[2].strip(), tools.get(one[1]))) for one in _all(_FUNCTION, text)]


def _arguments(text: str, tool: Tool | None) -> dict[str, Any]:
    """The arguments as Llama 3 writes them, or those of Qwen3-Coder, which are texts."""
    if text.startswith("{"):
        return msgspec.json.decode(text, type=dict[str, Any])
    return _values(_PARAMETER, text, tool)


def _values(pattern: re.Pattern[str], text: str, tool: Tool | None) -> dict[str, Any]:
    """The arguments, from their names and values in the text."""
    properties = tool.schema.get("properties") if tool else None
    schemas = properties if isinstance(properties, dict) else {}
    return {one[1]: _value(one[2], _kinds(schemas.get(one[1]))) for one in _all(pattern, text)}


def _value(text: str, kinds: set[str]) -> Any:
    """The value of the text: a text if it may be one, else JSON or a constant of Python."""
    if "string" in kinds or not (kinds or text.startswith(("{", "["))):
        return text
    with suppress(msgspec.DecodeError):
        return msgspec.json.decode(text)
    return _CONSTANTS.get(text, text)


def _kinds(schema: Any) -> set[str]:
    """The types that a schema names for itself and for its choices."""
    if not isinstance(schema, dict):
        return set()
    types = schema.get("type")
    kinds = {types} if isinstance(types, str) else set(types) if isinstance(types, list) else set()
    choices = [one for name in ("anyOf", "oneOf") if isinstance(given := schema.get(name), list) for one in given]
    return kinds.union(*map(_kinds, choices))


def _after_python_tag(text: str, tools: Mapping[str, Tool]) -> list[WrittenCall]:
    return [call for one in text.split("<|python_tag|>")[1:] for call in _objects(one, _Object)]


def _objects(text: str, type_: type[_Object]) -> list[WrittenCall]:
    """Calls as JSON, with semicolons between."""
    calls: list[WrittenCall] = []
    end = 0
    while (between := _BETWEEN.match(text, end)) and between.end() < len(text):
        value, end = _DECODER.raw_decode(text, between.end())
        calls.append(_call(msgspec.convert(value, type=type_)))
    return calls


def _of_mistral(text: str, tools: Mapping[str, Tool]) -> list[WrittenCall]:
    """A list, or as newer models write calls: the name and then the arguments, after the mark of each call."""
    calls: list[WrittenCall] = []
    for part in map(str.strip, text.split("[TOOL_CALLS]")[1:]):
        if part.startswith("["):
            calls += [_call(one) for one in msgspec.json.decode(part, type=list[_Object])]
        else:
            head, brace, rest = part.partition("{")
            name = head.removesuffix("[ARGS]").partition("[CALL_ID]")[0].strip()
            calls.append(WrittenCall(name, msgspec.json.decode(brace + rest, type=dict[str, Any])))
    return calls


def _of_deepseek(text: str, tools: Mapping[str, Tool]) -> list[WrittenCall]:
    calls: list[WrittenCall] = []
    for name, arguments in _marked(text, "<｜tool▁{}｜>", "calls▁begin call▁begin sep call▁end calls▁end"):
        if name == "function" and "```json" in arguments:
            # V3 writes the kind of the tool first, V3.1 does not.
            name, _, arguments = arguments.removesuffix("```").partition("```json")
        calls.append(WrittenCall(name.strip(), msgspec.json.decode(arguments, type=dict[str, Any])))
    return calls


def _of_kimi(text: str, tools: Mapping[str, Tool]) -> list[WrittenCall]:
    marks = "calls_section_begin call_begin call_argument_begin call_end calls_section_end"
    calls: list[WrittenCall] = []
    for id_, arguments in _marked(text, "<|tool_{}|>", marks):
        # Such as ``functions.name:0``.
        name = id_.strip().removeprefix("functions.").partition(":")[0]
        calls.append(WrittenCall(name, msgspec.json.decode(arguments, type=dict[str, Any])))
    return calls


def _marked(text: str, form: str, marks: str) -> list[tuple[str, str]]:
    """The texts before and after the middle mark of each call."""
    first, begin, middle, end, last = map(form.format, marks.split())
    *calls, rest = text.removeprefix(first).removesuffix(last).split(end)
    if rest.strip():
        raise ValueError("the text has more than calls")
    found = [call.strip().removeprefix(begin).partition(middle) for call in calls]
    return [(before, after) for before, _, after in found]


def _all(pattern: re.Pattern[str], text: str) -> list[re.Match[str]]:
    """The matches that make up the whole text. Raises ValueError if it has more."""
    found: list[re.Match[str]] = []
    while (at := found[-1].end() if found else 0) < len(text):
        if len(found) == _MOST or not (match := pattern.match(text, at)):
            raise ValueError("the text has more than calls")
        found.append(match)
    return found


def _call(given: _Object) -> WrittenCall:
    arguments = given.parameters if given.arguments is None else given.arguments
    if arguments is None:
        raise ValueError("a call has no arguments")
    return WrittenCall(given.name, arguments)


_DECODER = json.JSONDecoder()
# By the text with which they begin.
_FORMS: Mapping[str, Callable[[str, Mapping[str, Tool]], list[WrittenCall]]] = {
    "<tool_call>": _tagged,
    "<minimax:tool_call>": _tagged,
    "<｜DSML｜function_calls>": _tagged,
    "<function=": _functions,
    "<|python_tag|>": _after_python_tag,
    "[TOOL_CALLS]": _of_mistral,
    "<｜tool▁calls▁begin｜>": _of_deepseek,
    "<|tool_calls_section_begin|>": _of_kimi,
}
