"""Reads the slides of a presentation (ECMA-376): texts, tables, charts, diagrams and notes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from lxml import etree  # type: ignore[import-untyped]

from services.memory import spreadsheets

_DRAWING = "{http://schemas.openxmlformats.org/drawingml/2006/main}"
# A chart may state more points than it has, and then all of them would be looked for.
MAX_POINTS = 10_000
_RELATIONS = {"r": "http://schemas.openxmlformats.org/officeDocument/2006/relationships"}


def texts(file: IO[bytes]) -> Iterator[str]:
    """Each slide as Markdown."""
    from pptx import Presentation

    # Each slide once: a small file could name one a million times.
    for slide in {slide.part.partname: slide for slide in Presentation(file).slides}.values():
        title = slide.shapes.title
        shown = title is not None and title.text.strip()
        lines = [f"# {' '.join(title.text.split())}"] if shown else []
        others = [shape for shape in slide.shapes if not (shown and shape.shape_id == title.shape_id)]
        lines += [text for shape in others for text in _shape_texts(shape)]
        if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
            lines.append(slide.notes_slide.notes_text_frame.text)
        yield "\n\n".join(lines)


def _shape_texts(shape: Any) -> Iterator[str]:
    """The texts of a shape of a slide: of its text, its table, or the shapes of its group."""
    waiting = [shape]
    while waiting:
        shape = waiting.pop()
        if hasattr(shape, "shapes"):
            waiting += reversed(list(shape.shapes))
        elif getattr(shape, "has_table", False) and shape.has_table:
            yield spreadsheets.table(_cells(shape.table))
        elif getattr(shape, "has_chart", False) and shape.has_chart:
            yield _chart(shape.chart)
        elif shape.has_text_frame:
            yield shape.text_frame.text
        else:
            # The words of a diagram (SmartArt), or the description of a picture.
            yield "\n".join(_diagram(shape)) or shape.element.xpath("string((.//p:cNvPr/@descr)[1])")


def _cells(table: Any) -> list[list[str]]:
    """The cells of a slide's table. The text of a cell that spans rows stands in each of them."""
    rows = [[cell.text for cell in row.cells] for row in table.rows]
    for n, row in enumerate(table.rows):
        for column, cell in enumerate(row.cells):
            if cell.is_merge_origin:
                for below in range(n + 1, min(n + cell.span_height, len(rows))):
                    rows[below][column] = rows[n][column]
    return rows


def _chart(chart: Any) -> str:
    """The title of a chart, and its values as a table of categories and series."""
    stated = chart._chartSpace.xpath(".//c:ptCount/@val")
    if any(len(count) > 6 or int(count) > MAX_POINTS for count in stated):
        return ""
    title = chart.chart_title.text_frame.text if chart.has_title and chart.chart_title.has_text_frame else ""
    series = list(chart.series)
    categories = [str(category) for category in chart.plots[0].categories] if len(chart.plots) else []
    values = [list(each.values) for each in series]
    rows = [["", *(each.name for each in series)]]
    for n, category in enumerate(categories):
        cells = (each[n] if n < len(each) else None for each in values)
        rows.append([category, *("" if cell is None else f"{cell:.15g}" for cell in cells)])
    return f"{title}\n\n{spreadsheets.table(rows)}".strip()


def _diagram(shape: Any) -> Iterator[str]:
    # Without entities: a few of them could stand for gigabytes.
    parser = etree.XMLParser(resolve_entities=False)
    for id_ in etree._Element.xpath(shape.element, ".//*[local-name()='relIds']/@r:dm", namespaces=_RELATIONS):
        for paragraph in etree.fromstring(shape.part.related_part(id_).blob, parser).iter(f"{_DRAWING}p"):
            if text := "".join(part.text or "" for part in paragraph.iter(f"{_DRAWING}t")):
                yield text
