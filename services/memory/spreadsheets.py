"""Reads a workbook: one table per sheet, each cell as a reader of the sheet sees it; and a table in a text (CSV)."""

from __future__ import annotations

import csv
import datetime as dt
import io
import re
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any

from services.memory.domain import Block, Unreadable, is_repeated

# Rows of one block. A large sheet must not be in memory as one text.
BLOCK_ROWS = 1_000
_WHITE = re.compile(r"\s+")
# Of a table in a text, the first one wins among equals.
_DELIMITERS = ",;\t|"
_JUDGED_LINES = 50


def sheets(file: IO[bytes]) -> Iterator[Block]:
    """The sheets of an ``.xlsx`` file as Markdown tables. Empty rows and columns are left out."""
    from openpyxl import load_workbook  # type: ignore[import-untyped]

    book = load_workbook(file, read_only=True, data_only=True)
    for sheet in book.worksheets:
        # The stated dimensions may be wrong, and may be a million rows.
        sheet.reset_dimensions()
        used: set[int] = set()
        for row in sheet.iter_rows(values_only=True):
            used.update(n for n, value in enumerate(row) if _has_text(value))
        columns = sorted(used)
        header: list[str] = []
        lines: list[str] = []
        blocks = 0
        for row in sheet.iter_rows():
            cells = [_text(row[n]) if n < len(row) else "" for n in columns]
            if not any(cells):
                continue
            if not header:
                header = cells
                continue
            lines.append(_line(cells))
            if len(lines) == BLOCK_ROWS:
                yield _block(sheet.title, header, lines)
                lines, blocks = [], blocks + 1
        # A sheet with a single row has only a header.
        if lines or (header and not blocks):
            yield _block(sheet.title, header, lines)


def text_table(text: str) -> Iterator[Block]:
    """The rows of a CSV text (RFC 4180; also with semicolons, tabs or bars) as Markdown tables with its first row as
    their header. Empty rows are left out, and empty cells at the end of a row. Raises Unreadable."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text))
    head = ""
    lines: list[str] = []
    repeated: list[str] = []
    is_new = False
    try:
        for cells in rows:
            while cells and not cells[-1].strip():
                cells.pop()
            if not cells:
                continue
            if head:
                lines.append(_line(cells))
            else:
                head = _table(cells, [])
                lines = head.splitlines()
                # A header that no passage repeats would be read again for each block.
                repeated = lines.copy() if is_repeated(head) else []
            is_new = True
            if len(lines) >= BLOCK_ROWS:
                yield Block("\n".join(lines) + "\n")
                lines, is_new = repeated.copy(), False
    except csv.Error as error:
        raise Unreadable(f"The table (CSV) cannot be read at line {rows.line_num}: {error}.") from error
    if is_new:
        yield Block("\n".join(lines) + "\n")


def _delimiter(text: str) -> str:
    """The delimiter that cuts the most of the first lines into the same number of cells, of more than one."""
    sample = text[:65_536].splitlines()[:_JUDGED_LINES]

    def regularity(delimiter: str) -> tuple[int, int]:
        widths = Counter(len(row) for row in csv.reader(sample, delimiter=delimiter) if len(row) > 1)
        width, count = max(widths.items(), key=lambda item: (item[1], item[0]), default=(0, 0))
        return count, width

    try:
        return max(_DELIMITERS, key=regularity)
    except csv.Error:
        return ","


def table(rows: list[list[str]]) -> str:
    """A Markdown table. The first row is the header."""
    return _table(rows[0], [_line(row) for row in rows[1:]]) if rows else ""


def _block(title: str, header: list[str], lines: list[str]) -> Block:
    return Block(_table(header, lines), title)


def _table(header: list[str], lines: list[str]) -> str:
    rule = "|" + " --- |" * len(header)
    return "\n".join([_line(header), rule, *lines]) + "\n"


def _line(cells: list[str]) -> str:
    escaped = (_WHITE.sub(" ", cell).strip().replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _has_text(value: Any) -> bool:
    return value is not None and str(value).strip() != ""


def _text(cell: Any) -> str:
    value = cell.value
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, int | float):
        if str(cell.number_format).endswith("%"):
            return f"{value * 100:.15g}%"
        # 12.0 is 12, and 0.1 + 0.2 is 0.3, as the sheet shows them.
        return str(value) if isinstance(value, int) else f"{value:.15g}"
    if isinstance(value, dt.datetime):
        return value.isoformat(sep=" ").removesuffix(" 00:00:00")
    return "" if value is None else str(value)
