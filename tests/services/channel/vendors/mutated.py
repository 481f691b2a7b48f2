"""Genuine calls of every vendor with any other content."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from services.channel.vendors.base import Request
from tests.services.channel.vendors.examples import examples

# JSON that is nested deeper than Python can follow. Some vendors have JSON in a text.
DEEP = "[" * 5_000 + "]" * 5_000
STRANGE: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    10**30,
    "",
    "\0",
    "x" * 5_000,
    "\ud83d",
    "\u202e<!channel>",
    [],
    {},
    [[]],
    [None],
    {"a": {"b": []}},
    DEEP,
)


def _wecom(request: Callable[[bytes], Request]) -> Callable[[Any], Request]:
    def call(given: Any) -> Request:
        fields = given if isinstance(given, dict) else {}
        inner = "".join(f"<{name}><![CDATA[{value}]]></{name}>" for name, value in fields.items())
        return request(f"<xml>{inner}</xml>".encode(errors="surrogatepass"))

    return call


def _vendors() -> dict[str, tuple[dict[str, str], list[Any], Callable[[Any], Request]]]:
    """By vendor: the credentials, the contents of genuine calls, and how a call with any content is made."""
    found = {}
    for name, (fake, request, given) in examples().items():
        credentials: dict[str, str] = fake.credentials  # type: ignore[attr-defined]
        contents = [content for content, _ in given.values() if isinstance(content, dict)]
        if name == "wecom":
            fields = {"ToUserName": "x", "FromUserName": "ada", "CreateTime": "1", "Content": "hi", "MediaId": "m1"}
            fields |= {"Event": "click", "EventKey": "k", "MsgId": "1", "AgentID": credentials["agent_id"]}
            contents = [fields | {"MsgType": kind} for kind in ("event", *given) if "." not in kind]
            request = _wecom(request)
        elif name == "webhook":
            credentials = credentials | {"reply_url": "http://127.0.0.1:9/"}
        found[name] = credentials, contents, request
    return found


MADE = _vendors()


def halved(content: Any) -> Any:
    """The content with half of a character at the end of each text of a person."""
    if isinstance(content, list):
        return [halved(one) for one in content]
    if not isinstance(content, dict):
        return content
    found = {name: halved(value) for name, value in content.items()}
    for name in ("text", "body", "content", "caption"):
        # JSON in a text stays as it is.
        if isinstance(text := found.get(name), str) and text[:1] not in ("{", "["):
            found[name] = f"{text}\ud83d"
    return found


def changed(content: Any, chance: random.Random) -> Any:
    """The content with something else at a random place: another value, or one more or one less field."""
    if chance.random() < 0.1 or not content:
        return chance.choice(STRANGE)
    if isinstance(content, dict):
        name = chance.choice(list(content))
        match chance.randrange(5):
            case 0:
                return {other: value for other, value in content.items() if other != name}
            case 1:
                return content | {f"new {name}": chance.choice(STRANGE)}
        return content | {name: changed(content[name], chance)}
    if isinstance(content, list):
        at = chance.randrange(len(content))
        return [*content[:at], changed(content[at], chance), *content[at + 1 :]]
    return chance.choice(STRANGE)
