"""The options and functions with which commands print their results, for people and for programs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import msgspec
import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def printable(text: str) -> str:
    """`text` on one line. Control characters are escaped, because text from outside could steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_json(value: Any) -> None:
    """Prints one JSON document in ASCII: other control characters than those that JSON escapes could steer the terminal
    too."""
    print(json.dumps(msgspec.to_builtins(value, str_keys=True)))  # noqa: T201
