"""Reads the slides of a presentation (ECMA-376): texts, tables, charts, diagrams and notes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from lxml import etree  # type: ignore[import-untyped]

from services.memory.files import charts, spreadsheets, word
from services.memory.files.markup import MAX_REPEATED_CHARACTERS, is_apart

_DRAWING = "{http://schemas.openxmlformats.org/drawingml/2006/main}"
_COMPATIBILITY = "{http://schemas.openxmlformats.org/markup-compatibility/2006}"
_DRAWN = "{http://schemas.openxmlformats.org/presentationml/2006/main}contentPart"
_EQUATION = "{http://schemas.microsoft.com/office/drawing/2010/main}m"
_RELATIONS = {"r": "http://schemas.openxmlformats.org/officeDocument/2006/relationships"}


def texts(file: IO[bytes]) -> Iterator[str]:
    """Each slide as Markdown."""
    from pptx import Presentation

    # Each slide, chart and diagram once: a small file could name one a million times.
    read: set[str] = set()
    footers: set[str] = set()
    for slide in {slide.part.partname: slide for slide in Presentation(file).slides}.values():
        # PowerPoint writes a shape that older programs do not know, such as a box with an equation, in two forms.
        for choice in list(slide.shapes._spTree.iter(f"{_COMPATIBILITY}Choice")):
            for shape in list(choice):
                choice.getparent().addprevious(shape)
        # Lines drawn by hand, which the library does not know as a shape.
        for drawn in list(slide.shapes._spTree.iter(_DRAWN)):
            drawn.getparent().remove(drawn)
        for equation in list(slide.shapes._spTree.iter(_EQUATION)):
            equation.addprevious(equation.getparent().add_r(word.linear(equation)))
        _mark_powers(slide.shapes._spTree)
        title = slide.shapes.title
        shown = title is not None and title.text.strip()
        lines = [f"# {' '.join(title.text.split())}"] if shown else []
        others = [shape for shape in slide.shapes if not (shown and shape.shape_id == title.shape_id)]
        others = [shape for shape in others if not _is_repeated(shape, footers)]
        lines += [text for shape in others for text in _shape_texts(shape, read)]
        if slide.has_notes_slide and _is_new(slide.notes_slide.part, read):
            notes = slide.notes_slide.notes_text_frame
            lines += [] if notes is None else [notes.text]
        yield "\n\n".join(lines)


def _is_repeated(shape: Any, footers: set[str]) -> bool:
    """Whether a shape is the slide's number, or a date or footer among the `footers` of earlier slides: a slide with
    only a picture has no text of its own. Adds to them."""
    from pptx.enum.shapes import PP_PLACEHOLDER

    kind = shape.placeholder_format.type if shape.is_placeholder else None
    if kind not in (PP_PLACEHOLDER.DATE, PP_PLACEHOLDER.FOOTER):
        return bool(kind == PP_PLACEHOLDER.SLIDE_NUMBER)
    is_known = shape.text_frame.text in footers
    footers.add(shape.text_frame.text)
    return is_known


def _mark_powers(tree: Any) -> None:
    """Marks raised text that must stay apart from the text before it."""
    for run in tree.iter(f"{_DRAWING}r"):
        before, properties, text = run.getprevious(), run.find(f"{_DRAWING}rPr"), run.find(f"{_DRAWING}t")
        raised = "0" if properties is None else properties.get("baseline", "0")
        if before is None or text is None or raised[:1] in ("0", "-"):
            continue
        if is_apart(before.findtext(f"{_DRAWING}t") or "", text.text or ""):
            text.text = f"^{text.text}"


def _is_new(part: Any, read: set[str]) -> bool:
    is_new = part.partname not in read
    read.add(part.partname)
    return is_new


def _shape_texts(shape: Any, read: set[str]) -> Iterator[str]:
    """The texts of a shape of a slide: of its text, its table, or the shapes of its group. Adds the parts to `read`."""
    waiting = [shape]
    while waiting:
        shape = waiting.pop()
        if hasattr(shape, "shapes"):
            waiting += reversed(list(shape.shapes))
        elif getattr(shape, "has_table", False) and shape.has_table:
            yield spreadsheets.table(list(filter(any, spreadsheets.with_header(_cells(shape.table)))))
        elif getattr(shape, "has_chart", False) and shape.has_chart:
            if _is_new(shape.chart.part, read):
                title, cells = charts.read(shape.chart._chartSpace)
                yield f"{title}\n\n{spreadsheets.table(cells)}".strip()
        elif shape.has_text_frame:
            yield shape.text_frame.text
        else:
            # The words of a diagram (SmartArt), or the description of a picture.
            yield "\n".join(_diagram(shape, read)) or shape.element.xpath("string((.//p:cNvPr/@descr)[1])")


def _cells(table: Any) -> list[tuple[list[str], list[range]]]:
    """The rows of a slide's table, each with the places of its cells that span columns. The text of a cell that spans
    rows stands in each of them."""
    from pptx.table import _Cell

    rows: list[tuple[list[str], list[range]]] = []
    # Column → the text of a cell of an earlier row, and in how many rows it still stands.
    spanning: dict[int, tuple[str, int]] = {}
    repeatable = MAX_REPEATED_CHARACTERS
    # The library looks for all rows again for each of them.
    for row in table._tbl.tr_lst:
        cells: list[str] = []
        rows.append((cells, []))
        for column, cell in enumerate(row.tc_lst):
            text = _Cell(cell, table).text
            above, left = spanning.get(column, ("", 0))
            if cell.rowSpan > 1:
                spanning[column] = text, cell.rowSpan - 1
            elif left:
                spanning[column] = above, left - 1
                repeatable -= len(above)
                text = above if repeatable >= 0 else ""
            if cell.gridSpan > 1:
                rows[-1][1].append(range(column, min(column + cell.gridSpan, len(row.tc_lst))))
            cells.append(text)
    return rows


def _diagram(shape: Any, read: set[str]) -> Iterator[str]:
    # Without entities: a few of them could stand for gigabytes.
    parser = etree.XMLParser(resolve_entities=False)
    for id_ in etree._Element.xpath(shape.element, ".//*[local-name()='relIds']/@r:dm", namespaces=_RELATIONS):
        part = shape.part.related_part(id_)
        if _is_new(part, read):
            yield from charts.lines(etree.fromstring(part.blob, parser))
