"""Turns HTML into Markdown: headings, paragraphs, lists and tables. Hidden parts are left out. In linear time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from lxml import etree, html  # type: ignore[import-untyped]

from infra.stores.charsets import decode
from services.memory.files import navigation
from services.memory.files.numbering import written

# Not shown to a reader of the page.
_SKIPPED = frozenset(
    (
        "head",
        # As in a tracked change: without its mark, it would be one word with the text that replaces it.
        "del",
        "script",
        "style",
        "noscript",
        "template",
        "svg",
        "iframe",
        "object",
        "audio",
        "video",
        "datalist",
        # The pronunciation between the characters of a word would tear it apart.
        "rt",
        "rp",
    )
)
_HIDDEN_STYLE = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_HEADINGS = {f"h{n}": n for n in range(1, 7)}
_BLOCKS = frozenset(
    "address article aside blockquote body center dd details dialog div dl dt fieldset figcaption figure footer form "  # noqa: SIM905
    "header hr li main nav ol p pre section summary table tbody tfoot thead tr ul".split()
)
_CHARSET = re.compile(
    rb"(?:<meta[^>]{0,200}?charset|^\s*<\?xml[^>]{0,200}?encoding)\s*=\s*[\"']?\s*([A-Za-z0-9_:.-]{1,40})",
    re.IGNORECASE,
)
_PRESCANNED_BYTES = 4_096
_ENTERED = frozenset(("text", "number", "date", "time", "email", "tel", "url", "search"))
# Types of the numbers of a list.
_FORMS = {"a": "lowerLetter", "A": "upperLetter", "i": "lowerRoman", "I": "upperRoman"}
_WHITE = re.compile(r"\s+")
_TICKS = re.compile(r"^[ \t]*(`{3,})", re.MULTILINE)
# A value, and not a year, which may be the name of a column.
_VALUE = re.compile(r"(?!(?:19|20)\d\d$)[-+−]?[\d.,%$€£¥ ]+")
_POWER = re.compile(r"[-−+]?\d")
# A cell that spans rows stands in each of them, and one that spans columns has empty cells beside it. Without these
# limits, a small page could become a large text.
MAX_SPAN = 100
MAX_REPEATED_CHARACTERS = 1_000_000


def html_markdown(
    content: bytes, *, titled: bool = False, titles: Mapping[str, tuple[int, str]] = MappingProxyType({})
) -> tuple[str, str]:
    """The text of an HTML page as Markdown, and the page's encoding. `titled`, `titles`: as in `markdown`. Raises
    UnknownEncoding."""
    declared = _CHARSET.search(content[:_PRESCANNED_BYTES])
    text, encoding = decode(content, declared[1].decode("ascii") if declared else None)
    return markdown(text, titled=titled, titles=titles), encoding


def markdown(page: str, *, titled: bool = False, titles: Mapping[str, tuple[int, str]] = MappingProxyType({})) -> str:
    """An HTML page as Markdown. `titled`: its title is the first heading if it has none of the first level.

    titles: the id of an element, empty for the page, → level and text of its heading if it begins with none.
    """
    # A NUL would end the text for the parser. The parser refuses a declaration of an encoding in a decoded text.
    page = re.sub(r"^\s*<\?xml[^>]*>", "", page.replace("\0", " "), count=1)
    if not page.strip():
        return ""
    # huge_tree: without it, parts that are nested deeply are lost.
    root = html.document_fromstring(page, parser=html.HTMLParser(huge_tree=True, remove_comments=True, remove_pis=True))
    if titled:
        navigation.remove(root, _is_hidden)
    text = _Writer(titles).write(root)
    title = _WHITE.sub(" ", root.findtext("head/title") or "").strip() if titled else ""
    return f"# {title}\n{text}" if title and root.find(".//h1") is None else text


class _Writer:
    """Walks the tree without recursion: a page may be nested as deeply as it likes."""

    def __init__(self, titles: Mapping[str, tuple[int, str]]) -> None:
        self._titles = dict(titles)
        # The title of the text that follows.
        self._title = self._titles.pop("", None)
        self._out: list[str] = []
        # The line that is being written, and for each open cell the line outside it.
        self._line: list[str] = []
        self._outside: list[list[str]] = []
        self._prefix = ""
        # The open block of code, the line and the cells outside it, and the place of its first sign.
        self._pre: tuple[etree._Element, list[str], list[list[str]], int] | None = None
        # The number of the next item of each open list; None without numbers.
        self._items: list[int | None] = []
        # For each open table: the cells of the row, the header with its rule, and whether a table in a cell was written
        # since the last row.
        self._rows: list[list[str]] = []
        self._heads: list[str] = []
        self._interrupted: list[bool] = []
        # The cells of earlier rows that span the next ones, by column: their text, and how many rows are left.
        self._spanning: list[dict[int, tuple[str, int]]] = []
        # The cells of the row that span columns, and the first row if it has some: it may be a part of the header.
        self._spans: list[list[range]] = []
        self._first: list[tuple[list[str], list[range]] | None] = []
        self._repeatable = MAX_REPEATED_CHARACTERS

    def write(self, root: etree._Element) -> str:
        walk = etree.iterwalk(root, events=("start", "end"))
        for event, element in walk:
            if event == "start":
                if _is_hidden(element):
                    walk.skip_subtree()
                    continue
                self._begin(element)
                self._text(element.text)
            else:
                if not _is_hidden(element):
                    self._end(element)
                if element is not root:
                    self._text(element.tail)
        self._break()
        return "".join(self._out)

    def _begin(self, element: etree._Element) -> None:
        tag = element.tag
        if tag in _BLOCKS or tag in _HEADINGS:
            self._break()
        if not self._prefix.startswith("#"):
            self._title = self._titles.pop(element.get("id"), self._title)
        if tag in _HEADINGS:
            self._title = None
        if tag in _HEADINGS and not self._outside:
            self._out.append("\n")
            self._prefix = "#" * _HEADINGS[tag] + " "
        elif tag in ("ol", "ul"):
            self._items.append(_number(element, "start") if tag == "ol" else None)
        elif tag == "li":
            self._prefix = self._item(element)
        elif tag == "input":
            self._text(_input(element))
        elif tag == "table":
            self._rows.append([])
            self._heads.append("")
            self._interrupted.append(False)
            self._spanning.append({})
            self._spans.append([])
            self._first.append(None)
        elif tag == "tr" and self._rows:
            self._rows[-1], self._spans[-1] = [], []
        elif tag in ("td", "th") and self._rows:
            self._break()
            self._outside.append(self._line)
            self._line = []
        elif tag == "pre" and not self._pre and (not self._outside or _has_lines(element)):
            # In a cell, its lines would become one: it stands before the row.
            self._pre = element, self._line, self._outside, len(self._out)
            self._line, self._outside = [], []
            self._out.append("")
        elif tag == "br" and self._prefix.startswith("#"):
            self._text(" ")
        elif tag == "br":
            self._break()
        elif tag == "img":
            # Between two words, the description would be one with them.
            self._text(f" {element.get('alt')} " if (element.get("alt") or "").strip() else None)
        elif tag == "sup" and is_apart((self._line or [""])[-1], next(element.itertext(), "")):
            self._text("^")
        elif tag == "p" and not self._outside:
            self._out.append("\n")

    def _end(self, element: etree._Element) -> None:
        tag = element.tag
        if tag in ("td", "th") and self._rows and self._outside:
            text = _WHITE.sub(" ", "".join(self._line)).strip().replace("|", "\\|")
            self._line = self._outside.pop()
            self._cell(text, _span(element, "colspan"), _span(element, "rowspan"))
        elif tag == "tr" and self._rows:
            self._row()
        elif tag == "table" and self._rows:
            if first := self._first.pop():
                self._write_row(first[0])
            self._spans.pop()
            self._rows.pop()
            self._heads.pop()
            self._interrupted.pop()
            self._spanning.pop()
            self._out.append("\n")
            if self._interrupted:
                self._interrupted[-1] = True
        elif self._pre and element is self._pre[0]:
            self._break()
            _, self._line, self._outside, at = self._pre
            self._pre = None
            # Longer than each such sign in the code.
            signs = _TICKS.findall("".join(self._out[at:]))
            fence = "`" * (1 + max([2, *map(len, signs)]))
            self._out[at] = f"\n{fence}\n"
            self._out.append(f"{fence}\n")
            if self._outside:
                self._interrupted[-1] = True
        elif tag in _BLOCKS or tag in _HEADINGS:
            self._break()
            self._prefix = ""
        if tag in ("ol", "ul") and self._items:
            self._items.pop()

    def _cell(self, text: str, columns: int, rows: int) -> None:
        self._fill()
        row = self._rows[-1]
        if self._repeatable < 0:
            columns = rows = 1
        self._repeatable -= columns - 1
        if columns > 1:
            self._spans[-1].append(range(len(row), len(row) + columns))
        for n in range(columns):
            if rows > 1:
                self._spanning[-1][len(row)] = ("" if n else text, rows - 1)
            row.append("" if n else text)

    def _fill(self) -> None:
        """Adds the cells of earlier rows that stand in the next columns of the row."""
        row, spanning = self._rows[-1], self._spanning[-1]
        while self._repeatable >= 0 and (column := len(row)) in spanning:
            text, left = spanning.pop(column)
            if left > 1:
                spanning[column] = (text, left - 1)
            self._repeatable -= len(text) + 1
            row.append(text if self._repeatable >= 0 else "")

    def _row(self) -> None:
        self._fill()
        cells, self._rows[-1] = self._rows[-1], []
        if not any(cells):
            return
        first, self._first[-1] = self._first[-1], None
        if first:
            if header := joined(first[0], cells, first[1]):
                self._write_row(header)
                return
            self._write_row(first[0])
        elif self._spans[-1] and not self._heads[-1] and any(cells[1:]):
            self._first[-1] = cells, self._spans[-1]
            return
        self._write_row(cells)

    def _write_row(self, cells: list[str]) -> None:
        line = f"| {' | '.join(cells)} |\n"
        head = self._heads[-1]
        if not head and len(cells) > 1 and not any(cells[1:]):
            # A title of the whole table.
            line = f"{cells[0]}\n"
        elif not head:
            self._heads[-1] = line = line + "|" + " --- |" * len(cells) + "\n"
        elif self._interrupted[-1] and self._repeatable >= len(head):
            self._repeatable -= len(head)
            line = head + line
        self._interrupted[-1] = False
        self._out.append(line)

    def _item(self, element: etree._Element) -> str:
        """The sign before an item of a list."""
        if not self._items or (number := self._items[-1]) is None:
            return "- "
        number = _number(element, "value", number)
        self._items[-1] = number + 1
        parent = element.getparent()
        return f"{written(number, _FORMS.get(parent.get('type'), 'decimal'))}. "

    def _text(self, text: str | None) -> None:
        if self._title and text and text.strip() and not self._outside and not self._pre:
            (level, title), self._title = self._title, None
            self._break()
            self._prefix = ""
            self._out.append(f"\n{'#' * level} {title}\n")
            if text.strip() == title:
                return
        if text:
            self._line.append(text)

    def _break(self) -> None:
        """Ends the line, unless it belongs to a cell of a table."""
        if self._outside:
            self._line.append(" ")
            return
        text = "".join(self._line)
        self._line = []
        if self._pre:
            self._out.append(text.rstrip() + "\n" if text.strip() else "")
        elif text := _WHITE.sub(" ", text).strip():
            self._out.append(f"{self._prefix}{text}\n")
            self._prefix = ""


def joined(above: list[str], below: list[str], spans: Sequence[range]) -> list[str] | None:
    """One row for a header of two: the row with ``2025`` and ``2026``, whose cells span columns, and the row with their
    parts, ``Q1 Q2 Q1 Q2``. None if the row below does not belong to the header.

    spans: the columns of each cell that spans some. The name of any other column stands in one of the rows, or in both.
    """
    width = max(len(above), len(below))
    above, below = ([*cells, *[""] * (width - len(cells))] for cells in (above, below))
    names = {n: above[span[0]] for span in spans for n in span}
    parts = [below[n] for n in names]
    is_title = len(spans) == 1 and len(names) == width
    if is_title or not all(parts) or all(map(_VALUE.fullmatch, parts)):
        return None
    if any(n not in names and above[n] and below[n] not in ("", above[n]) for n in range(width)):
        return None
    return [f"{names[n]} {below[n]}" if names.get(n) else below[n] or above[n] for n in range(width)]


def is_apart(before: str, raised: str) -> bool:
    """Whether raised text is an exponent behind a number (10 to the power of 6 is not 106), or the mark of a footnote
    behind a word. Behind m or cm stands no mark, but a part of the unit."""
    is_word = len(before) > 2 and before[-3:].isalpha()
    return bool(_POWER.match(raised)) and (before[-1:].isdigit() or (is_word and raised[0].isdigit()))


def _has_lines(element: etree._Element) -> bool:
    return element.find(".//br") is not None or "\n" in "".join(element.itertext()).strip()


def _span(element: etree._Element, name: str) -> int:
    return max(1, min(_number(element, name), MAX_SPAN))


def _number(element: etree._Element, name: str, default: int = 1) -> int:
    given = (element.get(name) or "").strip()
    return int(given) if given.isascii() and given.isdecimal() and len(given) < 6 else default


def _input(element: etree._Element) -> str:
    """The value of a field of a form, as the page shows it."""
    type_ = (element.get("type") or "text").lower()
    if type_ in ("checkbox", "radio"):
        return "☑ " if element.get("checked") is not None else "☐ "
    return element.get("value") or "" if type_ in _ENTERED else ""


def _is_hidden(element: etree._Element) -> bool:
    """A reader of the page can open each of its tabs, and finds text that is hidden until it is found."""
    return (
        not isinstance(element.tag, str)
        or element.tag in _SKIPPED
        or (element.tag == "option" and element.get("selected") is None)
        or (
            element.get("role") != "tabpanel"
            and (
                element.get("hidden", "until-found").lower() != "until-found"
                or element.get("aria-hidden") == "true"
                or _HIDDEN_STYLE.search(element.get("style", "")) is not None
            )
        )
    )
