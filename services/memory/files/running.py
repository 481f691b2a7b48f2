"""Takes the headers and footers that a document repeats out of its pages: they tear sentences and tables apart. Pure.

Only lines that are set apart from the text are taken, so the header of a table stays above its rows on each page. The
page numbers in them may differ.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise, repeat
from statistics import median
from typing import NamedTuple

from services.memory.files.numbering import written

# A page is compared with so many before and behind it: left and right pages may have headers of their own.
REACH = 2
# A header has at most so many lines, a line so many parts, and a part so many characters.
_MAX_LINES, _MAX_PARTS, _MAX_CHARACTERS = 4, 6, 200
# In points.
_SAME_PLACE = 3.0
# A line so many times as high as most others is a title, as on slides.
_TITLE = 1.5
# So far may a page number be from the place of its page in the file. Numbers of invoices in one file go further.
_MAX_OFFSET = 500
# So many words of the text are kept, to tell which headers have words of their own.
_MAX_WORDS = 200_000
_ROMAN = {written(n, "lowerRoman"): n for n in range(1, 100)}
# A number that is alone, set apart by a sign, or called a page: ``- 3 -``, ``Guide | 3``, ``Page 3 of 9``.
_Page_NUMBER = re.compile(
    r"(?:^\W*|[|·•–—]\s*|\b(?:page|pag|pg|p|seite|página|pagina|pág|strona|strana|sida|side|страница|стр|ページ)\b\.?\s*|第\s*)"
    r"(\d{1,5}|(?=[ivxlc])(?:x[cl]|l?x{0,3})(?:i[xv]|v?i{0,3})\b)"
    r"(?:\s*(?:/|\b(?:of|von|de|di|sur|van|av|z|из)\b)\s*\d{1,5})?"
    r"(?:\s*(?:[页頁](?:\W*[共全]\s*\d{1,5}\s*[页頁])?|ページ)|(?=\W*$|\s*[|·•–—]))",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w+")


class Part(NamedTuple):
    """Text on one line, without a wide gap."""

    text: str
    """With the white space behind it."""
    top: float
    bottom: float
    """The distances of its ends from the upper edge of the page, in points."""


class PageLines(NamedTuple):
    number: int
    """From 1."""
    height: float
    parts: Sequence[Part]
    beside: Sequence[str]
    """Texts that stand on no line."""


class _Line(NamedTuple):
    top: float
    bottom: float
    parts: list[int]


class _Mark(NamedTuple):
    """A part of a line that may belong to a header or footer."""

    text: str
    place: float
    """Its distance from the edge."""
    form: str
    """The text without its page number."""
    number: int
    """The page number; 0: it has none."""


class _Margin(NamedTuple):
    lines: list[tuple[dict[int, _Mark], bool]]
    """The lines at an edge of a page, from the edge on, and whether each is set apart from the next one."""
    marks: dict[str, list[_Mark]]
    """Those of all lines by their form."""


class _Seen(NamedTuple):
    page: PageLines
    margins: tuple[_Margin, _Margin]


def without(pages: Iterable[PageLines], headers: dict[str, tuple[int, str]]) -> Iterator[tuple[PageLines, str]]:
    """Each page with its text, which is empty if the page has nothing but a header and a footer. Adds to `headers`
    those with words that stand in no text, each with the first page that has it; complete after the last page."""
    near: deque[_Seen | None] = deque([None] * (2 * REACH + 1), 2 * REACH + 1)
    words: set[str] = set()
    for seen in chain(map(_seen, pages), repeat(None, REACH)):
        near.append(seen)
        if (this := near[REACH]) is None:
            continue
        running = _running(this, [other for other in near if other and other is not this])
        text = ""
        for n, part in enumerate(this.page.parts):
            if n not in running:
                text += part.text
                continue
            if _WORD.search(header := " ".join(running[n].split())):
                headers.setdefault(header.casefold(), (this.page.number, header))
            if "\n" in part.text and text[-1:] not in ("", "\n"):
                text += "\n"
        yield this.page, text
        if len(words) < _MAX_WORDS:
            words.update(_WORD.findall(text.casefold()))
    for header in [each for each in headers if words.issuperset(_WORD.findall(each))]:
        del headers[header]


def _seen(page: PageLines) -> _Seen:
    lines: list[_Line] = []
    for n, part in sorted(enumerate(page.parts), key=lambda each: each[1].top):
        if lines and (part.top + part.bottom) / 2 < lines[-1].bottom:
            lines[-1].parts.append(n)
            lines[-1] = lines[-1]._replace(bottom=max(lines[-1].bottom, part.bottom))
        else:
            lines.append(_Line(part.top, part.bottom, [n]))
    usual = median(line.bottom - line.top for line in lines) if lines else 0.0
    return _Seen(page, (_margin(page, lines, usual, is_upper=True), _margin(page, lines[::-1], usual, is_upper=False)))


def _margin(page: PageLines, lines: Sequence[_Line], usual: float, *, is_upper: bool) -> _Margin:
    """lines: from the edge on. usual: the height of most of them."""
    margin = _Margin([], {})
    for line, inner in pairwise(lines[: _MAX_LINES + 1]):
        texts = {n: page.parts[n].text.strip() for n in line.parts[: _MAX_PARTS + 1]}
        is_title = line.bottom - line.top > _TITLE * usual
        if is_title or len(texts) > _MAX_PARTS or max(map(len, texts.values())) > _MAX_CHARACTERS:
            break
        marks = {}
        for n, text in texts.items():
            place = page.parts[n].top if is_upper else page.height - page.parts[n].bottom
            marks[n] = _Mark(text, place, *_form(text, page.number))
        gap = inner.top - line.bottom if is_upper else line.top - inner.bottom
        margin.lines.append((marks, gap > usual))
        for mark in marks.values():
            margin.marks.setdefault(mark.form, []).append(mark)
    return margin


def _form(text: str, page: int) -> tuple[str, int]:
    found = _Page_NUMBER.search(text)
    number = (int(found[1]) if found[1].isdecimal() else _ROMAN[found[1].lower()]) if found else 0
    if not found or not number or abs(number - page) > _MAX_OFFSET:
        return text, 0
    return f"{text[: found.start()]}\n{text[found.end() :]}", number


def _running(this: _Seen, others: Sequence[_Seen]) -> dict[int, str]:
    """The parts of the page's header and footer, and their text without the page number."""
    running: dict[int, str] = {}
    for edge, margin in enumerate(this.margins):
        taken: dict[int, str] = {}
        for marks, is_apart in margin.lines:
            same = {
                n: mark
                for n, mark in marks.items()
                if any(_is_in(other.margins[edge], mark, other.page.number - this.page.number) for other in others)
            }
            # Of a line with other text, such as the last row of a table, only the page number.
            taken |= {n: mark.form for n, mark in same.items() if len(same) == len(marks) or mark.number}
            if is_apart:
                running |= taken
            if len(same) < len(marks):
                break
    return running


def _is_in(margin: _Margin, mark: _Mark, pages: int) -> bool:
    """Whether the margin, so many pages further, has the mark too."""
    return any(
        abs(other.place - mark.place) < _SAME_PLACE
        and (other.text == mark.text or (mark.number and other.number == mark.number + pages))
        for other in margin.marks.get(mark.form, ())
    )
