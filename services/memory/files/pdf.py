"""Reads the pages of a PDF: their text, the values of their form's fields, and their comments."""

from __future__ import annotations

import ctypes
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

from services.memory.domain import UnreadableFile
from services.memory.files import ocr, running

# The longer side of a page in which text is recognised: 50 cm. A larger page is drawn smaller.
MAX_PIXELS = 4_000
# PDFium's sign for a hyphen at the end of a line, with the line break that may follow it.
_BROKEN = re.compile(r"\x02[\r\n]*(?=(\w?))")
# The hyphen of a word that the end of a page breaks, and the rest of the word on the next page.
_BROKEN_PAGE, _REST = re.compile(r"(?<=[^\W\d_])[-\xad]\s*\Z"), re.compile(r"\s*([^\W\d_]\S*)")
_MAX_ANNOTATIONS = 10_000
_RIGHT_TO_LEFT = ("R", "AL")
# The left, lower, right and upper end of a place on a page as it is shown, which the file may turn clockwise.
Turn = Callable[[float, float, float, float], tuple[float, float, float, float]]
_TURNED: dict[int, Turn] = {
    0: lambda left, bottom, right, top: (left, bottom, right, top),
    90: lambda left, bottom, right, top: (bottom, -right, top, -left),
    180: lambda left, bottom, right, top: (-right, -top, -left, -bottom),
    270: lambda left, bottom, right, top: (-top, left, -bottom, right),
}
# The sine of twice the angle of a line is below this if the line is level or upright.
_LEVEL = 0.01
# Text further right than so many times its height is a part of its own.
_WIDE_GAP = 2.0


def pages(
    file: IO[bytes], recognizer: ocr.Recognizer | None, recognized: list[int], headers: dict[str, tuple[int, str]]
) -> Iterator[str]:
    """The text of each page. Adds the numbers of the pages whose text was recognised in images to `recognized`, and
    fills `headers` as `running.without` does. Raises UnreadableFile."""
    from pypdfium2 import PdfDocument, PdfiumError  # type: ignore[import-untyped]

    try:
        document = PdfDocument(file)
    except PdfiumError as error:
        if "password" in str(error).lower():
            raise UnreadableFile("The PDF is encrypted. Upload it without a password.") from error
        raise
    # Without this, fields have no values.
    document.init_forms()
    for text, beside in _with_whole_words(_texts(document, recognizer, recognized, headers)):
        yield "\n".join(filter(None, (text, *beside)))


def _texts(
    document: Any, recognizer: ocr.Recognizer | None, recognized: list[int], headers: dict[str, tuple[int, str]]
) -> Iterator[tuple[str, Sequence[str]]]:
    """The text of each page, and the texts beside it."""
    for page, text in running.without(_pages(document), headers):
        # PDFium gives a character beyond the first 65,536 in two halves.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        text = _BROKEN.sub(lambda found: "" if found[1].islower() else "-", text)
        if recognizer and not text.strip():
            text = _recognized(document[page.number - 1], recognizer)
            if text.strip():
                recognized.append(page.number)
        yield text, page.beside


def _with_whole_words(pages: Iterable[tuple[str, Sequence[str]]]) -> Iterator[tuple[str, Sequence[str]]]:
    """A word that the end of a page breaks is whole, and on that page: a search would not find its parts."""
    before: tuple[str, Sequence[str]] | None = None
    for text, beside in pages:
        if before:
            broken, rest = _BROKEN_PAGE.search(before[0]), _REST.match(text)
            if broken and rest and rest[1][0].islower():
                before = before[0][: broken.start()] + rest[1], before[1]
                text = text[rest.end() :].lstrip()
            yield before
        before = text, beside
    if before:
        yield before


def _pages(document: Any) -> Iterator[running.PageLines]:
    for number in range(len(document)):
        page = document[number]
        yield running.PageLines(number + 1, page.get_height(), _parts(page), list(_annotations(document, page)))
        page.close()


def _parts(page: Any) -> list[running.Part]:
    """The characters of the page in the order in which they were written. PDFium puts line breaks, or nothing, between
    the cells of some tables: a character further right on the same line is set off by a space."""
    from pypdfium2 import raw

    words = page.get_textpage()
    turned = _TURNED[page.get_rotation()]
    edge = turned(*page.get_mediabox())[3]
    text: list[str] = []
    # The first piece of each part, and its upper and lower end.
    begins: list[int] = []
    ends: list[tuple[float, float]] = []
    left, right, bottom, top = (ctypes.c_double() for _ in range(4))
    places = tuple(map(ctypes.byref, (left, right, bottom, top)))
    # The end and the vertical extent of the last character that is shown.
    end = low = high = 0.0
    space = ""
    # The place of the last character on the page, and the number of the first piece of the text that has this place.
    place = (0.0, 0.0, 0.0, 0.0)
    begin = 0
    for n in range(words.count_chars()):
        character = chr(raw.FPDFText_GetUnicode(words.raw, n))
        if character.isspace():
            space += character
            continue
        if character < " ":
            text.append(character)
            continue
        raw.FPDFText_GetCharBox(words.raw, n, *places)
        before, place = place, turned(left.value, bottom.value, right.value, top.value)
        if place == before and unicodedata.bidirectional(character) in _RIGHT_TO_LEFT:
            # PDFium turns the letters of one sign round with their line.
            text.insert(begin, character)
            continue
        size = max(high - low, place[3] - place[1])
        is_same_line = place[1] < high and place[3] > low
        gap = place[0] - end
        if is_same_line and (gap > size or (space and gap >= 0)):
            space = " "
        if is_same_line and not space and _may_be_raised(character, text) and _is_raised(words, n, size, turned):
            # 10 to the power of 6 is not 106, and the mark of a footnote does not belong to its word.
            space = "^"
        begin = len(text) + 1
        text += (space, character)
        if not begins or not is_same_line or abs(gap) > _WIDE_GAP * size:
            begins.append(begin)
            ends.append((edge - place[3], edge - place[1]))
        else:
            ends[-1] = min(ends[-1][0], edge - place[3]), max(ends[-1][1], edge - place[1])
        space, end, low, high = "", place[2], place[1], place[3]
    words.close()
    pieces = zip([0, *begins[1:]], [*begins[1:], len(text)], strict=True) if begins else ()
    return [running.Part("".join(text[begin:end]), *each) for (begin, end), each in zip(pieces, ends, strict=True)]


def _may_be_raised(character: str, text: list[str]) -> bool:
    """Whether the character, if it stands higher, is an exponent behind a number, or the mark of a footnote behind a
    word. `text` has a character in each second piece. Behind m or cm stands no mark, but a part of the unit."""
    if not text or character not in "-−+0123456789":
        return False
    is_word = len(text) > 5 and not text[-2] + text[-4] and (text[-1] + text[-3] + text[-5]).isalpha()
    return text[-1].isdigit() or (character.isdigit() and is_word)


def _is_raised(words: Any, n: int, size: float, turned: Turn) -> bool:
    """Whether the baseline of a character is higher than that of the character before it, in text that is level."""
    from pypdfium2 import raw

    x, y = ctypes.c_double(), ctypes.c_double()
    heights = []
    for each in (n - 1, n):
        raw.FPDFText_GetCharOrigin(words.raw, each, x, y)
        heights.append(turned(x.value, y.value, x.value, y.value)[1])
    angle = raw.FPDFText_GetCharAngle(words.raw, n)
    return heights[1] - heights[0] > size / 5 and abs(math.sin(2 * angle)) < _LEVEL


def _annotations(document: Any, page: Any) -> Iterator[str]:
    """The fields of the form that have a value, and the comments."""
    from pypdfium2 import raw

    form = document.formenv.raw if document.formenv else None
    for n in range(min(raw.FPDFPage_GetAnnotCount(page.raw), _MAX_ANNOTATIONS)):
        annotation = raw.FPDFPage_GetAnnot(page.raw, n)
        kind = raw.FPDFAnnot_GetSubtype(annotation)
        if kind == raw.FPDF_ANNOT_WIDGET:
            if form and (value := _value(form, annotation)):
                name = _string(raw.FPDFAnnot_GetFormFieldAlternateName, form, annotation)
                name = name or _string(raw.FPDFAnnot_GetFormFieldName, form, annotation)
                yield f"{name}: {value}" if name else value
        elif kind not in (raw.FPDF_ANNOT_LINK, raw.FPDF_ANNOT_POPUP) and (
            comment := _string(raw.FPDFAnnot_GetStringValue, annotation, b"Contents")
        ):
            yield comment
        raw.FPDFPage_CloseAnnot(annotation)


def _value(form: Any, annotation: Any) -> str:
    from pypdfium2 import raw

    if raw.FPDFAnnot_GetFormFieldType(form, annotation) in (
        raw.FPDF_FORMFIELD_CHECKBOX,
        raw.FPDF_FORMFIELD_RADIOBUTTON,
    ):
        return "☑" if raw.FPDFAnnot_IsChecked(form, annotation) else ""
    return _string(raw.FPDFAnnot_GetFormFieldValue, form, annotation)


def _string(read: Callable[..., int], *arguments: Any) -> str:
    """A text of PDFium, which returns its length in bytes before it fills a buffer with UTF-16."""
    from pypdfium2 import raw

    size = read(*arguments, None, 0)
    buffer = (ctypes.c_ushort * (size // 2 + 1))()
    read(*arguments, ctypes.cast(buffer, ctypes.POINTER(raw.FPDF_WCHAR)), size)
    return bytes(buffer)[: max(0, size - 2)].decode("utf-16-le", errors="replace").strip()


def _recognized(page: Any, recognizer: ocr.Recognizer) -> str:
    """The text in the picture of a page."""
    # A page states its size in points, as it likes.
    scale = min(ocr.DOTS_PER_INCH / 72, MAX_PIXELS / max(page.get_size()))
    bitmap = page.render(scale=scale, grayscale=True)
    text = recognizer.text(bytes(bitmap.buffer), bitmap.width, bitmap.height, bitmap.stride)
    bitmap.close()
    return text
