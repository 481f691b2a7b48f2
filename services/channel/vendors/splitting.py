"""Cutting a long text where a reader would."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

# Best first: paragraph, line, sentence (also without a blank after it, as in Chinese and Japanese), word.
_PLACES = (
    re.compile(r"\n\s*\n"),
    re.compile(r"\n"),
    re.compile(r"(?<=[.!?…])\s|(?<=[。！？])"),
    re.compile(r"\s"),
)
_JOINER = "\N{ZERO WIDTH JOINER}"
# What is longer is no writing, and may be torn.
_LONGEST_CLUSTER = 64


def utf16_length(text: str) -> int:
    """In UTF-16 units, as Telegram counts."""
    return len(text) + sum(character > "\uffff" for character in text)


def split(text: str, limit: int, length: Callable[[str], int] = len) -> list[str]:
    """`text` in parts of at most `limit` by `length`; nothing but blanks at the cuts is lost. None for a blank text.

    A place in the first half of a part is passed over for a worse one later: parts should not be many.
    """
    parts = []
    rest = text.replace("\0", "").strip()
    while length(rest) > limit:
        end = _fitting(rest, limit, length)
        cut = _place(rest, end)
        parts.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return [*parts, rest] if rest else parts


def _fitting(text: str, limit: int, length: Callable[[str], int]) -> int:
    """How many characters fit. A character is one unit or more, so the answer lies at or below `limit`."""
    end = limit
    while (over := length(text[:end]) - limit) > 0:
        end -= max(1, over // 2)
    return end


def _place(text: str, end: int) -> int:
    for place in _PLACES:
        # One character further: a blank right behind what fits is a place too.
        if found := [match.end() for match in place.finditer(text, end // 2, end + 1)]:
            return min(found[-1], end)
    for at in range(end, max(end - _LONGEST_CLUSTER, 0), -1):
        if not _belongs_to_former(text, at):
            return at
    return end


def _belongs_to_former(text: str, at: int) -> bool:
    """Whether a cut before `at` would tear what is seen as one character: accents, joined or coloured emoji."""
    return (
        unicodedata.category(text[at]) in ("Mn", "Me", "Mc")
        or _JOINER in (text[at], text[at - 1])
        or "\U0001f3fb" <= text[at] <= "\U0001f3ff"
    )
