"""Parts of a request that a server refuses: the request is sent again without them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_READ_BYTES = 16 * 1024
"""Of an error answer. Patterns look for words with others behind them, which takes seconds for each megabyte."""
# The names of the limit of the answer. A server may know only one of them.
LIMITS = ("max_tokens", "max_completion_tokens")
# The platform chooses their values, so a server that refuses them does not know them.
_FIXED = ("stream_options", "parallel_tool_calls")
# Options of a request without which an answer is still useful.
_OPTIONS = (*_FIXED, *LIMITS, "tool_choice", "response_format", "seed")
# A server may refuse only one value of these: the next request has them again.
_VALUES = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "stop", "reasoning_effort")
# Other words for an option than its name.
_WORDS = {
    **dict.fromkeys(
        LIMITS, r"\bmax_?(completion_|new_|output_?)?tokens\b|(context|token) (length|limit)|maximum tokens"
    ),
    "response_format": r"response.?(format|schema|mime)|json.?schema|structured.output|grammar",
}
# The server does not know the option.
_UNKNOWN = re.compile(
    r"unknown|unrecogni[sz]ed|unexpected|extra|unavailable|unsupported|(not|n't) support|"
    r"not (permitted|allowed|available)",
    re.IGNORECASE,
)
# The server knows the option, but does not take this value.
_VALUE = re.compile(
    r"too (large|big|high|long|many|small|low)|at most|maximum|minimum|range|[<>]=|exceed|(less|greater) than|must be|"
    r"reduce|\bvalue\b|(\b|response_)schema\b",
    re.IGNORECASE,
)
# The largest limit that a server takes, in the words of OpenAI, Volcengine, Groq, DeepSeek, Anthropic and Google.
_LARGEST = re.compile(
    r"(?:at most|<=|less than or equal to|\[\d{1,9},)\s*[`'\"]?(\d{1,9})|(\d{1,9}), which is the maximum|"
    r"range is from \d{1,9} \(inclusive\) to (\d{1,9}) \((in|ex)clusive",
    re.IGNORECASE,
)
# Groq and OpenAI count the limit of the answer among the tokens of a minute. No wait would help.
_TOO_LARGE = re.compile(r"request too large", re.IGNORECASE)
# Google and Groq take a format or tools, not both.
_FORMAT_WITH_TOOLS = "format with tools"
_FORMAT, _TOOLS = re.compile(r"json|mime|format", re.IGNORECASE), re.compile(r"tool|function", re.IGNORECASE)
# The templates of some models know no system message, or want persons and the assistant to take turns.
_ROLES = {
    "system messages": re.compile(
        r"system\W{1,3}role|system[ _](role|message|prompt)|\brole\W{1,5}(does not support\W{1,3})?system\b|"
        r"developer instruction",
        re.IGNORECASE,
    ),
    "repeated roles": re.compile(r"alternat", re.IGNORECASE),
}
# Mistral takes ids of nine letters and digits, OpenAI of 40 characters. Calls of another model may have others.
_IDS = {
    "ids of calls": re.compile(
        r"tool.?call.?id.{0,200}(a-z|length)|tool_calls\S{0,20}id\b.{0,100}(length|too long)", re.IGNORECASE
    )
}

# Kimi and DeepSeek want thoughts with each call. Calls of another model, and calls that a client sends back, have none.
_THOUGHTS = {
    "missing thoughts": re.compile(
        r"reasoning_content\b.{0,60}\b(missing|passed back)|missing\W{1,3}reasoning_content", re.IGNORECASE
    )
}
# Some servers want a text beside calls. Others refuse an empty one, so it is left out first.
_NULL_CONTENTS = "null contents"
_NO_TEXT = re.compile(r"content\b.{0,200}\b(null|none|nil|string)\b", re.IGNORECASE | re.DOTALL)
# Kimi takes an empty text for a missing one.
_NO_THOUGHTS = " "

Body = Mapping[str, Any]


@dataclass(frozen=True)
class Refusal:
    """The refused parts of a request."""

    parts: frozenset[str]
    lasts: bool = False
    """Later requests are refused for the same reason."""
    values: Body = field(default_factory=dict)
    """The values that the server takes instead."""


def found(status: int, answer: bytes, body: Body, known: set[str]) -> Refusal | None:
    """The refusal in this answer; None if it names no part of the request, or only known parts."""
    text = answer[:MAX_READ_BYTES].decode(errors="replace")
    # llama.cpp answers 500 if a template refuses.
    for name, pattern in (_ROLES | _IDS | _THOUGHTS).items() if status in (400, 422, 500) else ():
        if name not in known and pattern.search(text):
            return Refusal(frozenset((name,)), lasts=True)
    sent = without(body, known)
    if status in (413, 429) and _limit(sent) and _TOO_LARGE.search(text):
        return Refusal(frozenset(LIMITS))
    if status not in (400, 422):
        return None
    is_value = bool(_VALUE.search(text))
    if {"tools", "response_format"} <= sent.keys() and _FORMAT.search(text) and _TOOLS.search(text) and not is_value:
        return Refusal(frozenset((_FORMAT_WITH_TOOLS,)), lasts=True)
    # An answer may also list the options that the server knows.
    named = [
        (at.start(), option) for option in (*_OPTIONS, *_VALUES) if option in sent and (at := _named(option, text))
    ]
    if not named:
        has_nulls = any(message.get("content", "") is None for message in sent.get("messages", ()))
        return Refusal(frozenset((_NULL_CONTENTS,)), lasts=True) if has_nulls and _NO_TEXT.search(text) else None
    option = min(named)[1]
    if option in _FIXED or (option not in _VALUES and _UNKNOWN.search(text) and not is_value):
        return Refusal(frozenset((option,)), lasts=True)
    if option not in LIMITS:
        return Refusal(frozenset((option,)))
    # Without a limit the model's own one holds, which is lower than the refused one.
    most = largest(text, sent[option])
    return Refusal(frozenset(LIMITS)) if most is None else Refusal(frozenset(), values={_limit(body): most})


def _named(option: str, text: str) -> re.Match[str] | None:
    return re.search(_WORDS.get(option, rf"\b{option}\b"), text, re.IGNORECASE)


def largest(text: str, limit: int) -> int | None:
    """The largest limit of an answer that this refusal of `limit` names; None if it names none."""
    named = (int(one or other or end) - (kind.lower() == "ex") for one, other, end, kind in _LARGEST.findall(text))
    return max((number for number in named if 0 < number < limit), default=None)


def without(body: Body, refused: set[str]) -> dict[str, Any]:
    """The request without the refused parts. The limit of the answer goes by its other name first."""
    kept = {name: value for name, value in body.items() if name not in refused}
    if (name := _limit(body)) in refused:
        kept |= {other: body[name] for other in LIMITS if other not in refused}
    if _FORMAT_WITH_TOOLS in refused and "tools" in kept:
        kept.pop("response_format", None)
    if "system messages" in refused:
        kept["messages"] = [m | {"role": "user"} if m["role"] == "system" else m for m in kept["messages"]]
    if refused & _ROLES.keys():
        kept["messages"] = _in_turns(kept["messages"])
    if refused & _IDS.keys():
        kept["messages"] = [_with_short_ids(message) for message in kept["messages"]]
    if _NULL_CONTENTS in refused:
        kept["messages"] = [m | {"content": m.get("content") or ""} for m in kept["messages"]]
    if refused & _THOUGHTS.keys():
        kept["messages"] = [
            {"reasoning_content": _NO_THOUGHTS} | m if m["role"] == "assistant" else m for m in kept["messages"]
        ]
    return kept


def _limit(body: Body) -> str:
    """The name of the limit of the answer in this request; empty if it has none."""
    return next((name for name in LIMITS if name in body), "")


def _with_short_ids(message: dict[str, Any]) -> dict[str, Any]:
    if calls := message.get("tool_calls"):
        return message | {"tool_calls": [call | {"id": _short(call["id"])} for call in calls]}
    return message | {"tool_call_id": _short(message["tool_call_id"])} if message["role"] == "tool" else message


def _short(id_: str) -> str:
    """An id of nine letters and digits."""
    return id_ if re.fullmatch("[a-zA-Z0-9]{9}", id_) else hashlib.blake2b(id_.encode(), digest_size=5).hexdigest()[:9]


def _in_turns(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring messages of a person, or texts of the assistant, as one."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        last = turns[-1] if turns else {}
        same = message["role"] in ("user", "assistant") and message["role"] == last.get("role")
        if same and message.keys() == last.keys() == {"role", "content"}:
            turns[-1] = last | {"content": _together(last["content"], message["content"])}
        else:
            turns.append(message)
    return turns


def _together(first: Any, second: Any) -> Any:
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    return [*_parts(first), *_parts(second)]


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
