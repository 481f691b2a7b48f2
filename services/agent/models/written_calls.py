"""Reads tool calls that a model has written as text. Pure.

Open models write a call as ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``. A server without a parser for the
model passes it on as the text of the answer.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

TAG = "<tool_call>"
_TAGS = re.compile("</?tool_call>")


class WrittenCall(msgspec.Struct, frozen=True):
    """A call as the model writes it."""

    name: str
    arguments: dict[str, Any]


def written_calls(text: str) -> list[WrittenCall]:
    """The calls of a text that has nothing but calls. Raises ValueError if it has something else."""
    between, calls = (_TAGS.split(text)[first::2] for first in (0, 1))
    if any(map(str.strip, between)):
        raise ValueError("the text has more than calls")
    try:
        return [msgspec.json.decode(call, type=WrittenCall) for call in calls]
    except msgspec.DecodeError as error:
        raise ValueError("a call is malformed") from error
