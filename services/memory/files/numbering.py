"""Numbers of a Word document's paragraphs, such as ``3.2`` or ``第三条``. The file has them as counters (ECMA-376)."""

from __future__ import annotations

import re
from collections import ChainMap
from dataclasses import dataclass, field

from lxml import etree  # type: ignore[import-untyped]

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_LEVELS = 9
_PLACE = re.compile(r"%([1-9])")
# A longer text around a number is not read, since each paragraph repeats it.
_MAX_TEXT = 100
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_ROMAN = {100: "c", 90: "xc", 50: "l", 40: "xl", 10: "x", 9: "ix", 5: "v", 4: "iv", 1: "i"}
_CHINESE = "一二三四五六七八九"


@dataclass(frozen=True)
class _Level:
    first: int
    form: str
    text: str
    """With ``%1`` for the number of the first level, and so on."""
    style: str | None


@dataclass
class _List:
    """One list of the document, with the numbers of its levels so far."""

    levels: dict[int, _Level]
    numbers: dict[int, int] = field(default_factory=dict)


class Numbers:
    """`parts`: those with the numbering and the styles of the document, in any order."""

    def __init__(self, *parts: etree._Element) -> None:
        roots = {part.tag: part for part in parts}
        numbering, styles = roots.get(f"{_W}numbering", ()), roots.get(f"{_W}styles", ())
        self._styles = {style.get(f"{_W}styleId"): style for style in styles if style.tag == f"{_W}style"}
        abstract = {each.get(f"{_W}abstractNumId"): each for each in numbering if each.tag == f"{_W}abstractNum"}
        lists = {id_: _List(_levels(each)) for id_, each in abstract.items()}
        self._lists: dict[str | None, tuple[_List, ChainMap[int, _Level], dict[int, int]]] = {}
        """By the id that paragraphs name: the list, its levels, and the levels that start again at a first number."""
        linked: dict[str, str] = {}
        for each in numbering:
            if each.tag != f"{_W}num":
                continue
            id_, of = each.get(f"{_W}numId", ""), _value(each.find(f"{_W}abstractNumId"))
            if of not in lists:
                continue
            begins: dict[int, int] = {}
            changed: dict[int, _Level] = {}
            for other in each.iterfind(f"{_W}lvlOverride"):
                changed |= _levels(other)
                if (first := other.find(f"{_W}startOverride")) is not None:
                    begins[_number(other.get(f"{_W}ilvl"))] = _number(_value(first))
            self._lists[id_] = lists[of], ChainMap(changed, lists[of].levels), begins
            if link := _value(abstract[of].find(f"{_W}numStyleLink")):
                linked[id_] = link
        for id_, link in linked.items():
            style = self._styles.get(link)
            if style is not None and (found := self._lists.get(_value(style.find(f"{_W}pPr/{_W}numPr/{_W}numId")))):
                self._lists[id_] = found

    def take(self, paragraph: etree._Element) -> str:
        """The number of the next paragraph; empty if it has none, or only a sign."""
        if not self._lists:
            return ""
        id_, at, style = self._place(paragraph.find(f"{_W}pPr"))
        if id_ not in self._lists:
            return ""
        list_, levels, begins = self._lists[id_]
        if at is None:
            at = next((n for n, level in levels.items() if level.style and level.style == style), 0)
        level = levels.get(at)
        if level is None:
            return ""
        numbers = list_.numbers
        numbers[at] = begins.pop(at, numbers.get(at, level.first - 1) + 1)
        for deeper in [n for n in numbers if n > at]:
            del numbers[deeper]
        if level.form in ("bullet", "none") or len(level.text) > _MAX_TEXT:
            return ""

        def shown(place: re.Match[str]) -> str:
            n = int(place[1]) - 1
            of = levels.get(n)
            return written(numbers.setdefault(n, of.first), of.form) if of and n <= at else ""

        return _PLACE.sub(shown, level.text).strip()

    def _place(self, properties: etree._Element | None) -> tuple[str | None, int | None, str | None]:
        """The list of a paragraph, the level, and the style that names the list."""
        if properties is None:
            return None, None, None
        own = properties.find(f"{_W}numPr")
        style = first = _value(properties.find(f"{_W}pStyle"))
        seen = set()
        while own is None and style in self._styles and style not in seen:
            seen.add(style)
            own = self._styles[style].find(f"{_W}pPr/{_W}numPr")
            first, style = style, _value(self._styles[style].find(f"{_W}basedOn"))
        if own is None:
            return None, None, None
        level = own.find(f"{_W}ilvl")
        return _value(own.find(f"{_W}numId")), None if level is None else _number(_value(level)), first


def _levels(parent: etree._Element) -> dict[int, _Level]:
    found = {}
    for level in parent.iterfind(f"{_W}lvl"):
        at = _number(level.get(f"{_W}ilvl"))
        if at < _LEVELS:
            found[at] = _Level(
                _number(_value(level.find(f"{_W}start")) or "1"),
                _value(level.find(f"{_W}numFmt")) or "decimal",
                _value(level.find(f"{_W}lvlText")) or "",
                _value(level.find(f"{_W}pStyle")),
            )
    return found


def _value(element: etree._Element | None) -> str | None:
    return None if element is None else element.get(f"{_W}val")


def _number(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) < 7 else 0


def written(number: int, form: str) -> str:
    """The number as the form writes it; in digits if the form is not known, or not for so large numbers."""
    if form == "decimalZero":
        return f"{number:02}"
    if not 0 < number < 100:
        return str(number)
    if form.endswith("Letter"):
        text = _LETTERS[(number - 1) % 26] * ((number - 1) // 26 + 1)
    elif form.endswith("Roman"):
        text, left = "", number
        for value, sign in _ROMAN.items():
            text += sign * (left // value)
            left %= value
    elif form.startswith(("chineseCounting", "japaneseCounting", "taiwaneseCounting")):
        tens, ones = divmod(number, 10)
        return (_CHINESE[tens - 1] if tens > 1 else "") + "十" * (tens > 0) + (_CHINESE[ones - 1] if ones else "")
    else:
        return str(number)
    return text.upper() if form.startswith("upper") else text
