"""Removes secrets from log lines and spans: by the name of a value, and by patterns in a text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from functools import lru_cache
from typing import Any
from uuid import UUID

MASK = "***"
MAX_TEXT = 8_000
"""Characters; the rest of a text is cut off, so that a 20 MB message does not become a 20 MB line."""
MAX_ITEMS = 100
MAX_DEPTH = 6
# Longer names are not remembered: a tenant could fill the memory with them.
_SHORT = 50

# "token", but not "tokens" (input_tokens=12), which is a count.
_NAME = r"passw(?:or)?d|secret|token(?!s|_count)|authorization|api[-_]?key|cookie|credential|private[-_]?key"
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
_SECRET_TEXT = (
    # scheme://user:password@host, scheme://token@host
    (re.compile(r"(://(?:[^\s/?#:@]*:)?)[^\s/?#\"'<>]*@"), rf"\1{MASK}@"),
    # password=…, "token": "…"
    (
        re.compile(rf"((?:{_NAME})(?:=[\"']?|[\"']\s*:\s*[\"']))[^\s\"',;&]+", re.IGNORECASE),
        rf"\1{MASK}",
    ),
    # The value in an error of pydantic, which libraries log with the answer of a tenant's server.
    (re.compile(r"(\[type=\w{1,60}), input_value=.{0,200}, input_type=\w{1,100}\]"), r"\1]"),
    (re.compile(r"\b(bearer|basic)\s+[\w\-.~+/=]{12,}", re.IGNORECASE), rf"\1 {MASK}"),
)


def redacted(value: Any, depth: int = 0) -> Any:
    """`value` in types that JSON has, without secrets and cut to the limits. Other objects become their text."""
    if isinstance(value, str):
        return _text(value)
    if value is None or isinstance(value, (bool, float, UUID, date)):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else str(value)
    if isinstance(value, Mapping) and depth < MAX_DEPTH:
        items = list(value.items())[:MAX_ITEMS]
        return {
            _text(str(name)): MASK if secret_name(str(name)) and item is not None else redacted(item, depth + 1)
            for name, item in items
        }
    if isinstance(value, (list, tuple, set, frozenset)) and depth < MAX_DEPTH:
        return [redacted(item, depth + 1) for item in list(value)[:MAX_ITEMS]]
    if isinstance(value, bytes):
        return _text(value[:MAX_TEXT].decode(errors="backslashreplace"))
    try:
        return _text(str(value))
    except Exception as error:
        # For example an ORM object without its session. A log call must not raise.
        return f"<{type(value).__name__} without a text: {type(error).__name__}>"


def secret_name(name: str) -> bool:
    """True if a value with this name is a secret."""
    return _known_name(name) if len(name) < _SHORT else _SECRET_NAME.search(name) is not None


# Nearly all names are those of our own log lines.
@lru_cache(maxsize=1024)
def _known_name(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None


def _may_hold_secret(text: str) -> bool:
    """Whether one of the patterns could match. Most texts have none of these, and the patterns take 6 µs."""
    if "@" in text or "=" in text or ":" in text or not text.isascii():
        return True
    lower = text.lower()
    return "bearer" in lower or "basic" in lower


def _text(value: str) -> str:
    if len(value) > MAX_TEXT:
        value = f"{value[:MAX_TEXT]}… ({len(value) - MAX_TEXT} characters more)"
    if _may_hold_secret(value):
        for pattern, replacement in _SECRET_TEXT:
            value = pattern.sub(replacement, value)
    # Lone surrogates (in a file name, in text of a broken client) cannot be encoded as UTF-8.
    return value if value.isascii() else value.encode(errors="backslashreplace").decode()
