"""Reads the pages of a PDF: their text, the values of their form's fields, and their comments."""

from __future__ import annotations

import ctypes
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import IO, Any

from services.memory.domain import UnreadableFile
from services.memory.files import ocr

# The longer side of a page in which text is recognised: 50 cm. A larger page is drawn smaller.
MAX_PIXELS = 4_000
# PDFium's sign for a hyphen at the end of a line, with the line break that may follow it.
_BROKEN = re.compile(r"\x02[\r\n]*(?=(\w?))")
_MAX_ANNOTATIONS = 10_000
_RIGHT_TO_LEFT = ("R", "AL")


def pages(file: IO[bytes], recognizer: ocr.Recognizer | None, recognized: list[int]) -> Iterator[str]:
    """The text of each page. Adds the numbers of the pages whose text was recognised in images to `recognized`.
    Raises UnreadableFile."""
    from pypdfium2 import PdfDocument, PdfiumError  # type: ignore[import-untyped]

    try:
        document = PdfDocument(file)
    except PdfiumError as error:
        if "password" in str(error).lower():
            raise UnreadableFile("The PDF is encrypted. Upload it without a password.") from error
        raise
    # Without this, fields have no values.
    document.init_forms()
    for number in range(len(document)):
        page = document[number]
        text = _text(page)
        if recognizer and not text.strip():
            text = _recognized(page, recognizer)
            if text.strip():
                recognized.append(number + 1)
        yield "\n".join(filter(None, (text, *_annotations(document, page))))
        page.close()


def _text(page: Any) -> str:
    """The characters of the page in the order in which they were written. PDFium puts line breaks, or nothing, between
    the cells of some tables: a character further right on the same line is set off by a space."""
    from pypdfium2 import raw

    words = page.get_textpage()
    text: list[str] = []
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
        before, place = place, (left.value, right.value, bottom.value, top.value)
        if place == before and unicodedata.bidirectional(character) in _RIGHT_TO_LEFT:
            # PDFium turns the letters of one sign round with their line.
            text.insert(begin, character)
            continue
        size = max(high - low, top.value - bottom.value)
        if bottom.value < high and top.value > low and (left.value - end > size or (space and left.value >= end)):
            space = " "
        begin = len(text) + 1
        text += (space, character)
        space, end, low, high = "", right.value, bottom.value, top.value
    words.close()
    # PDFium gives a character beyond the first 65,536 in two halves.
    whole = "".join(text).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return _BROKEN.sub(lambda found: "" if found[1].islower() else "-", whole)


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
    """A text of PDFium, which tells its length in bytes before it fills a buffer with UTF-16."""
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
