"""Recognises text in bitmaps with Tesseract's library, if the system has it (https://tesseract-ocr.github.io/tessapi/5.x/,
capi.h).

It works inside of the parser process. The library and its models are opened before that process is confined, and the
bitmap is one that PDFium has drawn, so no file of a tenant reaches the library and no other program is started.
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_void_p

# For all pages of a file, by the clock. A page of A4 takes two to four seconds of one processor.
FILE_SECONDS = 300.0
# Tesseract is trained for 300 dots per inch, and reads 200 in half of the time.
DOTS_PER_INCH = 200
# Each language makes it slower.
_MAX_LANGUAGES = 4
_BETWEEN_IDEOGRAPHS = re.compile(r"(?<=[\u3000-\u9fff\uff00-\uffef]) (?=[\u3000-\u9fff\uff00-\uffef])")


class Recognizer:
    """Reads the bitmaps of one file, one after the other."""

    def __init__(self, library: ctypes.CDLL, handle: int) -> None:
        self._library = library
        self._handle = handle
        self._deadline = time.monotonic() + FILE_SECONDS

    def text(self, bitmap: bytes, width: int, height: int, stride: int) -> str:
        """The text in a grey bitmap of one byte per pixel and `stride` bytes per row. Empty if there is none, or if the
        time is over before it is read."""
        library, handle = self._library, self._handle
        left = int((self._deadline - time.monotonic()) * 1000)
        if left <= 0:
            return ""
        library.TessBaseAPISetImage(handle, bitmap, width, height, 1, stride)
        library.TessBaseAPISetSourceResolution(handle, DOTS_PER_INCH)
        monitor = library.TessMonitorCreate()
        library.TessMonitorSetDeadlineMSecs(monitor, left)
        try:
            if library.TessBaseAPIRecognize(handle, monitor) != 0:
                return ""
        finally:
            library.TessMonitorDelete(monitor)
        found = library.TessBaseAPIGetUTF8Text(handle)
        if not found:
            return ""
        try:
            text = ctypes.string_at(found).decode(errors="replace")
        finally:
            library.TessDeleteText(found)
        # It puts a space after each ideograph.
        return _BETWEEN_IDEOGRAPHS.sub("", text)


def load() -> Recognizer | None:
    """With the installed languages, English first. None if the system has no Tesseract with English."""
    # More threads than one compete with the service, and they would not end with their part of the work.
    os.environ["OMP_THREAD_LIMIT"] = "1"
    try:
        library = ctypes.CDLL("libtesseract.so.5")
    except OSError:
        return None
    _declare(library)
    handle = library.TessBaseAPICreate()
    if library.TessBaseAPIInit3(handle, None, b"eng") != 0:
        return None
    others = sorted(name for name in _available(library, handle) if name not in (b"eng", b"osd") and b"/" not in name)
    if others and library.TessBaseAPIInit3(handle, None, b"+".join([b"eng", *others][:_MAX_LANGUAGES])) != 0:
        return None
    return Recognizer(library, handle)


def _available(library: ctypes.CDLL, handle: int) -> Sequence[bytes]:
    names = library.TessBaseAPIGetAvailableLanguagesAsVector(handle)
    found: list[bytes] = []
    while name := names[len(found)]:
        found.append(name)
    return found


def _declare(library: ctypes.CDLL) -> None:
    """The functions' types. Without them ctypes would cut pointers to 32 bits."""
    for name, result, arguments in (
        ("TessBaseAPICreate", c_void_p, ()),
        ("TessBaseAPIInit3", c_int, (c_void_p, c_char_p, c_char_p)),
        ("TessBaseAPIGetAvailableLanguagesAsVector", ctypes.POINTER(c_char_p), (c_void_p,)),
        ("TessBaseAPISetImage", None, (c_void_p, c_char_p, c_int, c_int, c_int, c_int)),
        ("TessBaseAPISetSourceResolution", None, (c_void_p, c_int)),
        ("TessBaseAPIRecognize", c_int, (c_void_p, c_void_p)),
        ("TessBaseAPIGetUTF8Text", c_void_p, (c_void_p,)),
        ("TessDeleteText", None, (c_void_p,)),
        ("TessMonitorCreate", c_void_p, ()),
        ("TessMonitorSetDeadlineMSecs", None, (c_void_p, c_int)),
        ("TessMonitorDelete", None, (c_void_p,)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
