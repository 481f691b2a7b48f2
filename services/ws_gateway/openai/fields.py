"""Checks of the fields of a request that have no type of their own. All raise Failure naming the field."""

from __future__ import annotations

import re
from typing import Any

from services.ws_gateway.openai.errors import invalid_field

MAX_TEXT = 100_000
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def check(holds: bool, field: str, reason: str) -> None:
    if not holds:
        raise invalid_field(field, reason)


def check_name(name: Any, where: str) -> None:
    check(isinstance(name, str) and bool(_NAME.fullmatch(name)), where, f"must fit ^{_NAME.pattern}$")


def string(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise invalid_field(where, "must be text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise invalid_field(where, "must be valid Unicode text") from None
    check(len(text) <= MAX_TEXT, where, f"must have {MAX_TEXT} characters at most")
    return text


def list_of(given: Any, where: str) -> list[Any]:
    check(given is None or isinstance(given, list), where, "must be a list")
    return given or []
