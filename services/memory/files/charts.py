"""Reads the charts of Word and PowerPoint (ECMA-376, DrawingML)."""

from __future__ import annotations

import re

from lxml import etree  # type: ignore[import-untyped]

CHART = "{http://schemas.openxmlformats.org/drawingml/2006/chart}"
_DRAWING = "{http://schemas.openxmlformats.org/drawingml/2006/main}"
# A number of a chart as the file has it: 0.1 + 0.2 is 0.30000000000000004 there.
_NUMBER = re.compile(r"-?\d{1,30}(?:\.\d{1,30})?(?:[Ee][-+]?\d{1,3})?")
MAX_CELLS = 200_000
"""Of the table of a chart."""


def read(space: etree._Element) -> tuple[str, list[list[str]]]:
    """The title of a chart, and its values as a table of categories and series. The library for slides reads only some
    kinds of charts, so the series are read from the file."""
    paragraphs = space.iterfind(f".//{CHART}chart/{CHART}title//{_DRAWING}p")
    title = "\n".join("".join(text.text or "" for text in each.iter(f"{_DRAWING}t")) for each in paragraphs)
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


def _points(series: etree._Element, *names: str) -> dict[str, str]:
    """The values or categories of a series by their numbers; of categories on several levels, the lowest."""
    points: dict[str, str] = {}
    for name in names:
        for point in series.iterfind(f"{CHART}{name}//{CHART}pt"):
            text = point.findtext(f"{CHART}v") or ""
            points.setdefault(point.get("idx", ""), f"{float(text):.15g}" if _NUMBER.fullmatch(text) else text)
    return points
