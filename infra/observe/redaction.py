"""Keeps secrets out of log lines and spans: by the name of a value, and by the look of a text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from typing import Any
from uuid import UUID

MASK = "***"
# Longer values are cut: a 20 MB message must not become a 20 MB line.
MAX_TEXT = 8_000
MAX_ITEMS = 100
MAX_DEPTH = 6

# token, but not tokens (input_tokens=12): those are counted, not kept secret.
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
    (re.compile(r"\b(bearer|basic)\s+[\w\-.~+/=]{12,}", re.IGNORECASE), rf"\1 {MASK}"),
)


def redacted(value: Any, depth: int = 0) -> Any:
    """`value` as JSON can say it, without secrets and within bounds. Objects of other types become their text."""
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
        # An ORM object that lost its session, for one. A log call must not become the error.
        return f"<{type(value).__name__} without a text: {type(error).__name__}>"


def secret_name(name: str) -> bool:
    """True where what is called so is a secret."""
    return _SECRET_NAME.search(name) is not None


def _text(value: str) -> str:
    if len(value) > MAX_TEXT:
        value = f"{value[:MAX_TEXT]}… ({len(value) - MAX_TEXT} characters more)"
    for pattern, replacement in _SECRET_TEXT:
        value = pattern.sub(replacement, value)
    # Lone surrogates (a file name, a broken client's text) have no UTF-8.
    return value if value.isascii() else value.encode(errors="backslashreplace").decode()
