"""Splits a long text between paragraphs, lines, sentences or words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

# Best first: paragraph, line, sentence (also without a space after it, as in Chinese and Japanese), word.
_PLACES = (
    re.compile(r"\n\s*\n"),
    re.compile(r"\n"),
    re.compile(r"(?<=[.!?…])\s|(?<=[。！？])"),
    re.compile(r"\s"),
)
_JOINER = "\N{ZERO WIDTH JOINER}"
# A longer cluster is not real text and may be split.
_LONGEST_CLUSTER = 64


def utf16_length(text: str) -> int:
    """The length in UTF-16 units, as Telegram counts."""
    return len(text) + sum(character > "\uffff" for character in text)


def split(text: str, limit: int, length: Callable[[str], int] = len) -> list[str]:
    """Splits `text` into parts of at most `limit`, measured by `length`. An empty text has no parts.

    Only white space at the cuts is lost. A good place in the first half of a part is skipped in favour of a worse one
    later, so that there are few parts.
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
    """The number of characters that fit. A character has at least one unit, so it is at most `limit`."""
    end = limit
    while (over := length(text[:end]) - limit) > 0:
        end -= max(1, over // 2)
    return end


def _place(text: str, end: int) -> int:
    for place in _PLACES:
        # One character further, because white space directly after the part is a place too.
        if found := [match.end() for match in place.finditer(text, end // 2, end + 1)]:
            return min(found[-1], end)
    for at in range(end, max(end - _LONGEST_CLUSTER, 0), -1):
        if not _belongs_to_former(text, at):
            return at
    return end


def _belongs_to_former(text: str, at: int) -> bool:
    """True if a cut before `at` would split one visible character: accents, joined or coloured emoji."""
    return (
        unicodedata.category(text[at]) in ("Mn", "Me", "Mc")
        or _JOINER in (text[at], text[at - 1])
        or "\U0001f3fb" <= text[at] <= "\U0001f3ff"
    )
