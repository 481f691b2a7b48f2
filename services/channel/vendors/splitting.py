"""Splits a long text between paragraphs, lines, sentences or words. Keeps code blocks whole or fenced, and tables whole
or with their head."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from markdown_it import MarkdownIt

# Best first: paragraph, line, sentence (also without a space after it, as in Chinese and Japanese), word.
_PLACES = (
    re.compile(r"\n\s*\n"),
    re.compile(r"\n"),
    re.compile(r"(?<=[.!?…])\s|(?<=[。！？])"),
    re.compile(r"\s"),
)
_LINE_END = re.compile(r"\n")
_MARKER = re.compile(r"[^>\s]")
_JOINER = "\N{ZERO WIDTH JOINER}"
# A longer cluster is not real text and may be split.
_LONGEST_CLUSTER = 64
# Below this limit code blocks are split as any text: the fences alone would fill the parts.
_LEAST_FOR_FENCES = 200


def utf16_length(text: str) -> int:
    """The length in UTF-16 units, as Telegram counts."""
    return len(text) + sum(character > "\uffff" for character in text)


def utf8_length(text: str) -> int:
    """The length in bytes of UTF-8."""
    return len(text.encode())


def split(text: str, limit: int, length: Callable[[str], int] = len) -> list[str]:
    """Splits `text` into parts of at most `limit`, measured by `length`. An empty text has no parts.

    Only white space at the cuts is lost, and the indent of a list that is cut. A good place in the first half of a
    part is skipped in favour of a worse one later, so that there are few parts. A cut inside a fenced code block is
    between two lines; the block is closed there and opened again in the next part. The work is linear in the text:
    `length` may render the text.
    """
    parts = []
    rest = text.replace("\0", "").strip()
    # Marks may vanish when a text is measured. But a text of twice the limit is not measured: each part would measure
    # the whole rest again.
    while len(rest) > 2 * limit or length(rest) > limit:
        cut = _place(rest, _fitting(rest, limit, length), _PLACES)
        fence = _open_fence(rest[:cut]) if limit >= _LEAST_FOR_FENCES else None
        if fence and length(f"{fence.again}\n\n{fence.closing}") > limit // 4:
            # Each part would repeat it, and have no room for more.
            fence = None
        table = _open_table(rest, cut, limit // 4) if fence is None else None
        if table is not None:
            start, head = table
            if start > cut // 2 and rest[:start].strip():
                parts.append(rest[:start].rstrip())
                rest = _begun(rest[start:])
                continue
            end = _place(rest, cut, (_LINE_END,))
            # With at least one row after the head.
            if end > start + len(head) + 2:
                parts.append(rest[:end].rstrip())
                rest = _begun(f"{head}\n{rest[end:].lstrip(chr(10))}")
                continue
        if fence is None:
            parts.append(rest[:cut].rstrip())
            rest = _begun(rest[cut:])
            continue
        # A block that begins late in the part moves to the next one, if there is something before it.
        if fence.start > cut // 2 and rest[: fence.start].strip():
            parts.append(rest[: fence.start].rstrip())
            rest = _taken_out(rest[fence.start :], fence.prefix, fence.quote)
            continue
        room = limit - length(f"\n{fence.closing}")
        cut = _place(rest, _fitting(rest, room, length), (_LINE_END,))
        if cut <= fence.start + len(fence.line) + 1:
            # The first line of the block is longer than a part.
            cut = _fitting(rest, room, length)
        parts.append(f"{rest[:cut].rstrip(chr(10))}\n{fence.closing}")
        left = _taken_out(rest[cut:].removeprefix("\n"), fence.prefix, fence.quote)
        # Perhaps only the closing fence of the block is left of it.
        closing = re.match(rf"[\s{fence.quote[:1]}]*{fence.mark}{fence.mark[0]}*[ \t]*(?:\n|$)", left)
        rest = _begun(left[closing.end() :]) if closing else f"{fence.again}\n{left}"
    return [*parts, rest] if rest else parts


class _Fence(NamedTuple):
    """A code block that a cut separates."""

    start: int
    """The index of its first line."""
    line: str
    """Its first line."""
    prefix: str
    """Stands before each further line: the indent in a list, and the marks of a quotation."""
    mark: str

    @property
    def quote(self) -> str:
        """The prefix without the lists: the next part does not begin in one."""
        return "> " * self.prefix.count(">")

    @property
    def again(self) -> str:
        return f"{self.quote}{self.line[len(self.prefix) :].strip()}"

    @property
    def closing(self) -> str:
        return f"{self.prefix}{self.mark}"


@cache
def _blocks() -> MarkdownIt:
    return MarkdownIt("commonmark").disable("inline")


def _open_fence(text: str) -> _Fence | None:
    """The code block that is open at the end of `text`."""
    if "```" not in text and "~~~" not in text:
        return None
    # One character for one, and no other line ends than here.
    text = text.replace("\r", " ")
    text = text if text.endswith("\n") else f"{text}\n"
    last = next((token for token in reversed(_blocks().parse(text)) if token.type == "fence"), None)
    if last is None or last.map is None:
        return None
    first, end = last.map
    # A block that is closed has one line more than its code and its first line.
    if end < text.count("\n") or last.content.count("\n") < end - first - 1:
        return None
    lines = text.split("\n")
    line = lines[first]
    prefix = _MARKER.sub(" ", line[: line.index(last.markup)])
    return _Fence(sum(len(one) + 1 for one in lines[:first]), line, prefix, last.markup)


def _taken_out(text: str, prefix: str, instead: str) -> str:
    """`text` with another prefix in the lines of the list or quotation in which it begins.

    Four spaces outside of a list would make a code block of any text.
    """
    taken: list[str] = []
    at = 0 if prefix != instead else len(text)
    while at < len(text):
        end = text.find("\n", at) + 1 or len(text)
        line = text[at:end]
        if line.startswith(prefix):
            line = instead + line.removeprefix(prefix)
        elif line.strip("> \t\n"):
            break
        taken.append(line)
        at = end
    return "".join(taken) + text[at:] if taken else text


def _begun(text: str) -> str:
    """`text` without the white space before it, and without the indent of its first line in the lines that follow."""
    rest = text.lstrip()
    indent = text[: len(text) - len(rest)].rpartition("\n")[2]
    # Not a wide space, with which each paragraph of a Chinese text may begin.
    return rest if indent.strip(" \t") else _taken_out(indent + rest, indent, "")


def _open_table(text: str, cut: int, most: int) -> tuple[int, str] | None:
    """The table whose rows a cut separates: its start, and its first two lines, of `most` characters at most."""
    lines = text[:cut].rstrip("\n").split("\n")
    following = text[cut:].removeprefix("\n").partition("\n")[0]
    if "|" not in following:
        return None
    first = len(lines)
    while first and "|" in lines[first - 1]:
        first -= 1
    for n in range(first, len(lines) - 1):
        if _is_delimiter(lines[n + 1]):
            head = "\n".join(lines[n : n + 2])
            return (sum(len(line) + 1 for line in lines[:n]), head) if len(head) <= most else None
    return None


def _is_delimiter(line: str) -> bool:
    """True for the second line of a table, such as ``|---|:-:|``, also in a quotation."""
    return "|" in line and "-" in line and not line.lstrip("> \t").strip("|:- \t")


def _fitting(text: str, limit: int, length: Callable[[str], int]) -> int:
    """The number of characters that fit. A character has at least one unit, so it is at most `limit`."""
    end = min(limit, len(text))
    while end > 1 and (size := length(text[:end])) > limit:
        # In proportion: a character may have four bytes.
        end = max(min(end - 1, end * limit // size), 1)
    return end


def _place(text: str, end: int, places: tuple[re.Pattern[str], ...]) -> int:
    for place in places:
        # One character further, because white space directly after the part is a place too.
        if found := [match.end() for match in place.finditer(text, end // 2, end + 1)]:
            return min(found[-1], end)
    for at in range(end, max(end - _LONGEST_CLUSTER, 0), -1):
        if at == len(text) or not _belongs_to_former(text, at):
            return at
    return end


def _belongs_to_former(text: str, at: int) -> bool:
    """True if a cut before `at` would split one visible character: accents, joined or coloured emoji, flags."""
    return (
        unicodedata.category(text[at]) in ("Mn", "Me", "Mc")
        or _JOINER in (text[at], text[at - 1])
        or "\U0001f3fb" <= text[at] <= "\U0001f3ff"
        # The flags of England, Scotland and Wales are a black flag with letters of this range.
        or "\U000e0020" <= text[at] <= "\U000e007f"
        or _flag_letters_before(text, at) % 2 == 1
    )


def _flag_letters_before(text: str, at: int) -> int:
    """The number of regional indicators directly before `at`, if one stands at `at` too; two of them are a flag."""
    if not "\U0001f1e6" <= text[at] <= "\U0001f1ff":
        return 0
    start = at
    while start > 0 and "\U0001f1e6" <= text[start - 1] <= "\U0001f1ff":
        start -= 1
    return at - start
