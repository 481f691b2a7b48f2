"""Reads the charts and diagrams of Office files (ECMA-376, DrawingML)."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator

from lxml import etree  # type: ignore[import-untyped]

CHART = "{http://schemas.openxmlformats.org/drawingml/2006/chart}"
_DRAWING = "{http://schemas.openxmlformats.org/drawingml/2006/main}"
# A number of a chart as the file has it: 0.1 + 0.2 is 0.30000000000000004 there.
_NUMBER = re.compile(r"-?\d{1,30}(?:\.\d{1,30})?(?:[Ee][-+]?\d{1,3})?")
# A number format whose number is a day, without its quoted text, escaped signs, and colours.
_NO_FORMAT, _DAY_FORMAT = re.compile(r'"[^"]*"|\\.|\[[^\]]*\]'), re.compile("[ymd]", re.IGNORECASE)
# A day is the number of days since the first one.
_FIRST_DAY, _MAX_DAYS = dt.date(1899, 12, 30), 2_958_465
MAX_CELLS = 200_000
"""Of the table of a chart."""


def read(space: etree._Element) -> tuple[str, list[list[str]]]:
    """The titles of a chart and of its axes, and its values as a table of categories and series. The library for slides
    reads only some kinds of charts, so the series are read from the file."""
    title = "\n".join(line for each in space.iter(f"{CHART}title") for line in lines(each))
    categories: dict[str, str] = {}
    rows, names = [], [""]
    for series in space.iter(f"{CHART}ser"):
        named = series.find(f"{CHART}tx")
        names.append("" if named is None else "".join(value.text or "" for value in named.iter(f"{CHART}v")))
        categories = categories or _points(series, "cat", "xVal")
        rows.append(_points(series, "val", "yVal"))
    if not categories:
        categories = dict.fromkeys((n for row in rows for n in row), "")
    # A small file could have as many series as categories, without values.
    if len(categories) * len(rows) > MAX_CELLS:
        return title, []
    return title, [names, *([category, *(row.get(n, "") for row in rows)] for n, category in categories.items())]


def lines(part: etree._Element) -> Iterator[str]:
    """The paragraphs that have text, of a diagram (SmartArt), a drawing or a title."""
    for paragraph in part.iter(f"{_DRAWING}p"):
        pieces = paragraph.iter(f"{_DRAWING}t", f"{_DRAWING}br")
        if line := "".join(piece.text or "" if piece.tag == f"{_DRAWING}t" else " " for piece in pieces):
            yield line


def _points(series: etree._Element, *names: str) -> dict[str, str]:
    """The values or categories of a series by their numbers; of categories on several levels, the lowest."""
    points: dict[str, str] = {}
    for name in names:
        format_ = _NO_FORMAT.sub("", series.findtext(f"{CHART}{name}//{CHART}formatCode") or "")
        is_day = _DAY_FORMAT.search(format_)
        for point in series.iterfind(f"{CHART}{name}//{CHART}pt"):
            text = point.findtext(f"{CHART}v") or ""
            if is_day and text.isdecimal() and len(text) < 8 and int(text) <= _MAX_DAYS:
                text = (_FIRST_DAY + dt.timedelta(int(text))).isoformat()
            points.setdefault(point.get("idx", ""), f"{float(text):.15g}" if _NUMBER.fullmatch(text) else text)
    return points
