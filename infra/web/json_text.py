"""Checks of JSON that comes from outside: depth, and text that stores and encoders refuse."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from infra.errors import InvalidMessage

MAX_DEPTH = 100
"""Of nested arrays and objects. Recursive code of any library survives this depth."""
LARGE_BYTES = 64 * 1024
# Escapes of NUL and of surrogates; unescaped, JSON and UTF-8 do not allow them. And numbers that Python reads as
# infinite or as no number, and writes as null.
_SUSPICIOUS = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])|NaN|Infinity|[eE]\+?\d{3}|\d{200}")
# Control characters, line separators, marks that change the direction of the text around them, and signs without width:
# with them a name could look like another one, or forge lines of a mail or a log. Joiners are parts of words.
NAME_PATTERN = r"^[^\x00-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\uffff]*$"
"""The names that people see in lists, questions and mails."""
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def check_json(body: bytes) -> None:
    """Raises InvalidMessage (field: the path of the value) if `body` is nested too deeply, if one of its texts has NUL
    or a lone surrogate, or if a number is not finite. A body that is not JSON passes: the code that decodes it reports
    that.
    """
    if not _SUSPICIOUS.search(body) and body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    try:
        value = json.loads(body)
    except RecursionError:
        raise _too_deep() from None
    except ValueError:
        return
    _check_value([], value)


def _check_value(path: list[str | int], value: Any) -> None:
    """`path`: one list for all values, as a path of its own for each would take a hundred times the body's memory."""
    if len(path) > MAX_DEPTH:
        raise _too_deep()
    match value:
        case str():
            _check_text(path, value)
        case float() if not math.isfinite(value):
            raise InvalidMessage(_name(path), "must be a finite number")
        case dict():
            for key, item in value.items():
                _check_text(path, key)
                path.append(key)
                _check_value(path, item)
                path.pop()
        case list():
            for n, item in enumerate(value):
                path.append(n)
                _check_value(path, item)
                path.pop()


async def check_beside(body: bytes, check: Callable[[bytes], None] = check_json) -> None:
    """Runs the check, in a thread if the body is large: it would hold the event loop for a tenth of a second."""
    if len(body) > LARGE_BYTES:
        await asyncio.to_thread(check, body)
    else:
        check(body)


def _check_text(path: Sequence[str | int], text: str) -> None:
    # Only a failure has its path named: keys may be long, and each of many texts below one would name it again.
    if fault := _fault(text):
        raise InvalidMessage(_name(path), fault)


def _fault(text: str) -> str | None:
    # PostgreSQL refuses NUL, and UTF-8 a lone surrogate.
    if "\0" in text:
        return "must not contain NUL"
    return "must be Unicode text, without lone surrogates" if _SURROGATE.search(text) else None


def _too_deep() -> InvalidMessage:
    return InvalidMessage("body", f"must have at most {MAX_DEPTH} nested arrays and objects")


def _name(path: Sequence[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    return _SURROGATE.sub("?", text) or "body"
