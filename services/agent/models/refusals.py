"""Options and orders of messages that a server refuses: the request is sent again without them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Options of a request without which an answer is still useful.
_OPTIONS = (
    "stream_options",
    "parallel_tool_calls",
    "max_completion_tokens",
    "max_tokens",
    "tool_choice",
    "response_format",
    "seed",
)
# A server may refuse only one value of these: the next request has them again.
_VALUES = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "stop", "reasoning_effort")
# The templates of some models know no system message, or want persons and the assistant to take turns.
_ROLES = {
    "system messages": re.compile(r"system[ _](role|message|prompt)|developer instruction", re.IGNORECASE),
    "repeated roles": re.compile(r"alternat", re.IGNORECASE),
}

Body = Mapping[str, Any]


def found(status: int, answer: bytes, body: Body, known: set[str]) -> str | None:
    """The part of the request that this answer refuses; None if it names none, or only parts that are known."""
    text = answer.decode(errors="replace")
    # llama.cpp answers 500 if a template refuses.
    for name, pattern in _ROLES.items() if status in (400, 422, 500) else ():
        if name not in known and pattern.search(text):
            return name
    if status not in (400, 422):
        return None
    sent = set(body) | ({"max_tokens"} if "max_completion_tokens" in known else set())
    named = (option for option in (*_OPTIONS, *_VALUES) if option in sent - known)
    return next((option for option in named if re.search(rf"\b{option}\b", text)), None)


def lasts(refused: str) -> bool:
    """Whether later requests are refused for the same reason."""
    return refused not in _VALUES


def without(body: Body, refused: set[str]) -> dict[str, Any]:
    """The request without the refused parts. The limit of the answer goes by its older name first."""
    kept = {name: value for name, value in body.items() if name not in refused}
    if "max_completion_tokens" in refused & body.keys() and "max_tokens" not in refused:
        kept["max_tokens"] = body["max_completion_tokens"]
    if "system messages" in refused:
        kept["messages"] = [m | {"role": "user"} if m["role"] == "system" else m for m in kept["messages"]]
    if refused & _ROLES.keys():
        kept["messages"] = _in_turns(kept["messages"])
    return kept


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
