"""Reads a workbook: one table per sheet, each cell as a reader of the sheet sees it; and a table in a text (CSV)."""

from __future__ import annotations

import csv
import datetime as dt
import io
import operator
import posixpath
import re
import zipfile
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, groupby, islice, zip_longest
from operator import itemgetter
from typing import IO, Any

from services.memory.domain import Block, UnreadableFile, is_repeated
from services.memory.files import charts
from services.memory.files.markup import MAX_REPEATED_CHARACTERS, joined

# Rows of one block. A large sheet must not be in memory as one text.
BLOCK_ROWS = 1_000
# A small file can repeat one long text in each cell.
MAX_BLOCK_CHARACTERS = 100_000_000
# Among so many rows of a table, without the empty ones, its header is looked for.
FIRST_ROWS = 10
# Each table of a sheet is read by itself.
_MAX_SIDE_BY_SIDE = 8
# Of a sheet of Excel. A row may state any number, and the library makes all rows before it.
MAX_ROWS = 1_048_576
_WHITE, _DIGIT, _NAME = re.compile(r"\s+"), re.compile(r"\d"), re.compile(r"[^\W\d_]{2}")
# Of a table in a text, the first one wins among equals.
_DELIMITERS = ",;\t|"
_JUDGED_LINES = 50
# The first line of a table that Excel has written.
_STATED_DELIMITER = re.compile(r"sep=([,;\t|])\r?\n", re.IGNORECASE)
_MERGED = re.compile(rb'<(?:\w{1,20}:)?mergeCell\s{1,9}ref="([A-Z]{1,3})(\d{1,7}):([A-Z]{1,3})(\d{1,7})"')
_MAX_MERGED = 10_000
# A row's cells that the other columns of a wide table do not have are found by the first one, of so many characters.
_MAX_KEY = 200
_FORMULA = re.compile(rb"<f(?:\s[^<>]{0,300})?(?:/>|>[^<]{0,8192}</f>)(?:<v\s?/>|<v></v>)?</c>")
_FORMULA_BYTES = 9_000
# The kinds of the parts of a drawing that have text.
_DRAWN = ("chart", "diagramData")
# Of a number format: quoted and escaped text, a currency, a colour or condition, space of the width of a character.
_FORMAT = re.compile(
    r'"(?P<quoted>[^"]*)"|\\(?P<escaped>.)|\[\$(?P<currency>[^\]-]*)[^\]]*\]|\[[^\]]*\]|[_*].|'
    r"(?P<general>General)|(?P<sign>.)"
)
# Of Excel.
MAX_FORMAT = 255
_CONDITION = re.compile(r"\[(<=|>=|<>|=|<|>)(-?\d{1,20}(?:\.\d{1,20})?)\]")
_COMPARED = {
    "<": operator.lt,
    "<=": operator.le,
    "=": operator.eq,
    "<>": operator.ne,
    ">": operator.gt,
    ">=": operator.ge,
}
# Commas after the last digit before the point: each divides the shown number by 1,000.
_THOUSANDS = re.compile(r"[0#?](,+)(?![0#?,])")
_READ_BYTES = 65_536


def sheets(file: IO[bytes], warnings: list[str]) -> Iterator[Block]:
    """The sheets of an ``.xlsx`` file as Markdown tables, each with its comments and text boxes. Empty rows and columns
    are left out. Adds hidden sheets and missing values to `warnings`."""
    from openpyxl import load_workbook  # type: ignore[import-untyped]

    # Without the values of other workbooks: a link to one may be broken.
    book = load_workbook(file, read_only=True, data_only=True, keep_links=False)
    # A small workbook could name one part as thousands of sheets, or thousands of times as the drawing of one.
    read: set[str] = set()
    for sheet in book.worksheets:
        if sheet._worksheet_path in read:
            continue
        read.add(sheet._worksheet_path)
        # The stated dimensions may be wrong, and may be a million rows.
        sheet.reset_dimensions()
        # Each column that is used → how many more of its values are texts than are not.
        used: Counter[int] = Counter()
        for row in sheet.iter_rows(max_row=MAX_ROWS, values_only=True):
            used.update({n: 1 if isinstance(value, str) else -1 for n, value in enumerate(row) if _has_text(value)})
        for columns in _side_by_side(used):
            merged = _Merged(book, sheet)
            yield from _blocks(with_header(_rows(sheet, columns, merged)), sheet.title)
        if beside := "\n".join(_beside(book._archive, sheet._worksheet_path, read)):
            yield Block(beside, sheet.title)
        if sheet.sheet_state != "visible":
            warnings.append(f"The sheet {sheet.title} is hidden, and was read.")
        if merged.without_value:
            warnings.append(
                f"Formulas of the sheet {sheet.title} have no stored values, so they are empty: open and save the file."
            )


def _side_by_side(used: Mapping[int, int]) -> list[list[int]]:
    """The columns of each table, of several ones with empty columns between. A single column, or columns that name
    nothing because they have only numbers, belong to the table before the empty column."""
    tables: list[list[int]] = [[]]
    for _, group in groupby(enumerate(sorted(used)), lambda each: each[1] - each[0]):
        columns = [column for _, column in group]
        is_table = len(columns) > 1 < len(tables[-1]) and any(used[column] > 0 for column in columns)
        if is_table and len(tables) < _MAX_SIDE_BY_SIDE:
            tables.append(columns)
        else:
            tables[-1] += columns
    return tables


def _rows(sheet: Any, columns: list[int], merged: _Merged) -> Iterator[tuple[list[str], list[range]]]:
    """The rows, each with the places of its cells that span columns."""
    for number, row in enumerate(sheet.iter_rows(max_row=MAX_ROWS), 1):
        cells = [_text(row[n]) if n < len(row) else "" for n in columns]
        merged.fill(number, columns, cells)
        yield cells, merged.spans(number, columns)


def with_header(rows: Iterable[tuple[list[str], list[range]]]) -> Iterator[list[str]]:
    """The rows. Of the first ones that have text, and of those behind an empty row, two that are one header are one."""
    above: tuple[list[str], list[range]] | None = None
    n = 0
    for row in rows:
        n = n + 1 if any(row[0]) else 0
        header = joined(above[0], row[0], above[1]) if above else None
        if above and not header:
            yield above[0]
        above = row if row[1] and not header and n <= FIRST_ROWS else None
        if not above:
            yield header or row[0]
    if above:
        yield above[0]


class _Merged:
    """The cells of a sheet that span several rows. Their text stands in each row, so that a row makes sense alone."""

    def __init__(self, book: Any, sheet: Any) -> None:
        from openpyxl.utils import column_index_from_string  # type: ignore[import-untyped]

        self._last_row: dict[tuple[int, int], int] = {}
        """Row and column of the first cell → the last row, rows counted from 1 and columns from 0."""
        self._open: dict[int, tuple[str, int]] = {}
        """Column → its text and the last row."""
        self._spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
        """Row → the first and last columns of its cells that span columns."""
        self._repeatable = MAX_REPEATED_CHARACTERS
        self.without_value = False
        """Whether the file has formulas whose values no program has stored."""
        # The library reads rows one by one, and the merged cells stand after the last one.
        with book._archive.open(sheet._worksheet_path) as part:
            rest = b""
            while piece := part.read(_READ_BYTES):
                rest += piece
                for found in _MERGED.finditer(rest):
                    left, right = (column_index_from_string(found[n].decode()) - 1 for n in (1, 3))
                    first, last = int(found[2]), int(found[4])
                    if last > first and len(self._last_row) < _MAX_MERGED:
                        self._last_row[first, left] = last
                    if right > left and len(self._spans) < _MAX_MERGED:
                        self._spans[first].append((left, right))
                self.without_value = self.without_value or _FORMULA.search(rest) is not None
                rest = rest[-_FORMULA_BYTES:]

    def spans(self, number: int, columns: list[int]) -> list[range]:
        """The places of the cells of a row that span several of the columns."""
        found = self._spans.pop(number, ())
        places = (range(bisect_left(columns, left), bisect_right(columns, right)) for left, right in found)
        return [place for place in places if len(place) > 1]

    def fill(self, number: int, columns: list[int], cells: list[str]) -> None:
        """Completes the cells of a row, unless it is empty."""
        if not self._last_row or not any(cells):
            return
        for n, column in enumerate(columns):
            if last := self._last_row.get((number, column)):
                self._open[column] = cells[n], last
            elif column in self._open:
                text, last = self._open[column]
                if number > last:
                    del self._open[column]
                elif not cells[n] and self._repeatable >= len(text):
                    self._repeatable -= len(text)
                    cells[n] = text


def text_table(text: str) -> Iterator[Block]:
    """The rows of a CSV text (RFC 4180; also with semicolons, tabs or bars) as Markdown tables with their header. Empty
    rows are left out, and empty cells at the end of a row. Raises UnreadableFile."""
    stated = _STATED_DELIMITER.match(text)
    if stated:
        text = text[stated.end() :]
    delimiter = stated[1] if stated else _delimiter(text)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        yield from _blocks(map(_without_empty_end, rows))
    except csv.Error as error:
        raise UnreadableFile(f"The table (CSV) cannot be read at line {rows.line_num}: {error}.") from error


def _without_empty_end(cells: list[str]) -> list[str]:
    while cells and not cells[-1].strip():
        cells.pop()
    return cells


def _delimiter(text: str) -> str:
    """The delimiter that cuts the most of the first lines into the same number of cells, of more than one."""
    sample = text[:65_536].splitlines()[:_JUDGED_LINES]

    def regularity(delimiter: str) -> tuple[int, bool, int]:
        widths = Counter(
            len(row) for row in csv.reader(sample, delimiter=delimiter, skipinitialspace=True) if len(row) > 1
        )
        width, count = max(widths.items(), key=lambda item: (item[1], item[0]), default=(0, 0))
        # Cells with another delimiter in each line: the commas are those of decimal numbers, or of texts.
        return count, count > 0 and delimiter != ",", width

    try:
        return max(_DELIMITERS, key=regularity)
    except csv.Error:
        return ","


def table(rows: list[list[str]]) -> str:
    """A Markdown table. Rows above its header, such as a title, stand as text before it."""
    if not rows:
        return ""
    at = _header(rows[:FIRST_ROWS])
    return "\n".join([*_titles(rows[:at]), *_head(rows[at]), *map(_line, rows[at + 1 :])]) + "\n"


def _blocks(rows: Iterable[list[str]], section: str | None = None) -> Iterator[Block]:
    """The tables that stand one below the other, without empty rows."""
    for _, table_rows in groupby(_numbered(rows), itemgetter(0)):
        yield from _table_blocks((row for _, row in table_rows), section)


def _numbered(rows: Iterable[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Each row that has text, with the number of its table. A table may begin behind an empty row."""
    number = 0
    # The first rows of the table, and the last one.
    begin: list[list[str]] = []
    row: list[str] = []
    for group in (group for is_filled, group in groupby(rows, any) if is_filled):
        first = list(islice(group, FIRST_ROWS))
        if _header([*begin, *first][:FIRST_ROWS]) < len(begin) and _is_table(first, begin, row):
            number, begin = number + 1, []
        begin = [*begin, *first][:FIRST_ROWS]
        for row in chain(first, group):
            yield number, row


def _is_table(first: list[list[str]], begin: list[list[str]], before: list[str]) -> bool:
    """Whether rows behind an empty one are a table of their own. They repeat the header of the table above, or their
    header has only words. One of them is then above a number, and below a number or no cell of the row `before`."""
    at = _header(first)
    names = list(filter(None, first[at]))
    if len(names) < 2 or len(first) == at + 1:
        return False
    if first[at] == begin[_header(begin)]:
        return True
    is_header = all(map(_NAME.search, names)) and not any(map(_DIGIT.search, names))
    return is_header and any(
        name and _DIGIT.search(value) and (not above or _DIGIT.search(above))
        for name, value, above in zip_longest(first[at], first[at + 1], before, fillvalue="")
    )


def _table_blocks(filled: Iterator[list[str]], section: str | None) -> Iterator[Block]:
    """As `table`, in blocks with the header. A table whose header is too long for each passage is read as several ones,
    each with some of the columns beside the first one."""
    first = list(islice(filled, FIRST_ROWS))
    at = _header(first)
    parts = [(begin, end, _head(_part(first[at], begin, end))) for begin, end in _parts(first[at])]
    lines = _titles(first[:at])
    rest = chain(first[at + 1 :], filled)
    is_first = True
    while (block := list(islice(rest, BLOCK_ROWS))) or is_first:
        if sum(len(cell) for row in block for cell in row) > MAX_BLOCK_CHARACTERS:
            raise UnreadableFile(f"{BLOCK_ROWS} rows of a table have more than {MAX_BLOCK_CHARACTERS} characters.")
        for begin, end, head in parts:
            shown = [row for row in block if begin == 0 or any(row[begin:end])]
            if shown or (is_first and any(first[at][begin:end])):
                # A header that no passage repeats would be read again for each block.
                lines += head if is_first or is_repeated("\n".join(head)) else []
                lines += [_line(_part(row, begin, end)) for row in shown]
                yield Block("\n".join(lines) + "\n", section)
                lines = []
        is_first = False


def _parts(header: list[str]) -> list[tuple[int, int | None]]:
    """The columns of each table that a wide one is read as, from the first one until before the last one: as many as
    each passage can repeat the names of."""
    parts: list[tuple[int, int | None]] = []
    begin = 0
    if not is_repeated("\n".join(_head(header))):
        for end in range(2, len(header)):
            if end > begin and not is_repeated("\n".join(_head(_part(header, begin, end + 1)))):
                parts.append((begin, end))
                begin = end
    return [*parts, (begin, None)]


def _part(cells: list[str], begin: int, end: int | None) -> list[str]:
    """The first cell, and those from `begin` on."""
    return cells[begin:end] if begin == 0 else [*(cell[:_MAX_KEY] for cell in cells[:1]), *cells[begin:end]]


def _header(rows: list[list[str]]) -> int:
    """Which of the first rows is the header: the first one that fills half of the cells that the fullest one fills. A
    row with nothing but its first cell is a title, and a row of a name and a value above a wider table is its label.

    Above three columns it is one only if the row of their names has no digit and a later one has some: otherwise it may
    be the header of a table whose third column has no name.
    """
    filled = [sum(map(bool, cells)) for cells in rows]
    most = max(filled)
    if not filled[0]:
        # Of the values of a chart whose series have no names.
        return 0
    at = next(n for n, count in enumerate(filled) if 2 * count >= most and not (1 == count < most and rows[n][0]))
    wide = [n for n, count in enumerate(filled) if count >= max(3, most - 1)]
    if filled[at] != 2 or len(wide) < 2:
        return at
    with_digits = [any(map(_DIGIT.search, rows[n])) for n in wide]
    is_wider = most > 3 or (all(rows[at][:2]) and with_digits[0] < any(with_digits))
    return wide[0] if is_wider else at


def _titles(rows: list[list[str]]) -> list[str]:
    lines = [_WHITE.sub(" ", ", ".join(filter(None, cells))) for cells in rows]
    return [*lines, ""] if lines else []


def _head(cells: list[str]) -> list[str]:
    return [_line(cells), "|" + " --- |" * len(cells)]


def _line(cells: list[str]) -> str:
    escaped = (_WHITE.sub(" ", cell).strip().replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _has_text(value: Any) -> bool:
    return value is not None and str(value).strip() != ""


def _text(cell: Any) -> str:
    from openpyxl.utils.escape import unescape  # type: ignore[import-untyped]

    value = cell.value
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, int | float):
        return _number(value, str(cell.number_format))
    if isinstance(value, dt.datetime):
        return value.isoformat(sep=" ").removesuffix(" 00:00:00")
    if isinstance(value, dt.timedelta):
        seconds = round(value.total_seconds())
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    # The file has the end of a line of Windows as _x000D_.
    return "" if value is None else unescape(str(value))


def _number(value: float, format_: str) -> str:
    """The number with all of its digits, and with the currency, unit or words that the sheet shows."""
    before, after, digits, is_torn = "", "", "", False
    # Of each place of a digit an empty text, and the texts between them.
    places: list[str] = []
    section, minus = _section(value, format_)
    value = abs(value)
    for found in _FORMAT.finditer(section):
        sign = "0" if found["general"] else found["sign"] or ""
        if sign and sign in "0#?.,%":
            digits += sign
        word = found["quoted"] or found["escaped"] or found["currency"] or (sign if sign and sign in "$€£¥% " else "")
        if sign and sign in "0#?":
            # A space between digits groups them. Other text there makes a code of the number.
            is_torn, after = is_torn or bool(after.strip()), ""
            places.append("")
        elif digits.strip("%"):
            after += word
        else:
            before += word
        if text := word or (sign if sign in "-/:()+" else ""):
            places.append(text)
    if "%" in digits:
        value *= 100
    for commas in _THOUSANDS.findall(digits):
        value /= 1000 ** len(commas)
    # 12.0 is 12, and 0.1 + 0.2 is 0.3, as the sheet shows them.
    text = str(value) if isinstance(value, int) else f"{value:.15g}"
    if digits == "0" * len(digits) and len(digits) > 1 and text.isdecimal():
        text = _code(text, places)
    elif not digits and before.strip():
        # Words in place of the number: it is not lost.
        return f"{before.strip()} ({minus}{text})"
    elif digits and not is_torn:
        text = f"{before}{text}{after}".strip()
    return minus + text


def _section(value: float, format_: str) -> tuple[str, str]:
    """The part of a number format that shows this value, and the minus to be shown before it, if it needs one."""
    sections = format_[:MAX_FORMAT].split(";")
    minus = "-" if value < 0 else ""
    if _CONDITION.search(format_):
        for section in sections:
            condition = _CONDITION.search(section)
            if condition is None or _COMPARED[condition[1]](value, float(condition[2])):
                return section, minus
        return "", minus
    positive, negative, zero = (*sections, "", "")[:3]
    if minus and negative:
        # Words of its own say that it is negative (Loss 3), or a sign among them does. A colour would be lost.
        words = _words(negative)
        is_told = "-" in words or (any(map(str.isalpha, words)) and words != _words(positive))
        return negative, "" if is_told else minus
    # An accountant's zero is a dash: the number says more.
    is_shown = any(sign in zero for sign in "0#") or any(map(str.isalpha, _words(zero)))
    return zero if value == 0 and is_shown else positive, minus


def _words(section: str) -> str:
    return "".join(found["quoted"] or found["escaped"] or "" for found in _FORMAT.finditer(section))


def _code(text: str, places: list[str]) -> str:
    """The number 7120 as 07-120, if its format is 00-000."""
    width = places.count("")
    text = text.zfill(width)
    first = len(text) - width + 1
    digits = iter((text[:first], *text[first:]))
    return "".join(place or next(digits) for place in places).strip()


def _beside(archive: zipfile.ZipFile, path: str, read: set[str]) -> Iterator[str]:
    """The comments of a sheet with their cells, and the lines of its text boxes, diagrams and titles of charts."""
    for kind, part in _related(archive, path, read):
        if kind == "comments":
            for comment in part.iter("{*}comment"):
                yield f"{comment.get('ref')}: {''.join(text.text or '' for text in comment.iter('{*}t'))}"
        else:
            yield from charts.lines(part)


def _related(archive: zipfile.ZipFile, path: str, read: set[str]) -> Iterator[tuple[str, Any]]:
    """The parts to which a part of the workbook refers, with their kinds, unless they are `read` already; of a drawing
    also its charts and diagrams."""
    from lxml import etree  # type: ignore[import-untyped]

    folder, name = posixpath.split(path)
    relations = f"{folder}/_rels/{name}.rels"
    names = archive.NameToInfo
    if relations not in names:
        return
    # Without entities: a few of them could stand for gigabytes.
    parser = etree.XMLParser(resolve_entities=False)
    for relation in etree.fromstring(archive.read(relations), parser):
        kind = posixpath.basename(relation.get("Type", ""))
        target = posixpath.normpath(posixpath.join("/", folder, relation.get("Target", "")))[1:]
        if kind in ("comments", "drawing", *_DRAWN) and target in names and target not in read:
            read.add(target)
            yield kind, etree.fromstring(archive.read(target), parser)
            if kind == "drawing":
                yield from (found for found in _related(archive, target, read) if found[0] in _DRAWN)
