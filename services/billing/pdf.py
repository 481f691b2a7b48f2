"""An invoice as PDF 1.4 (ISO 32000) with the built-in fonts Helvetica and Courier. Pure: the same data, the same bytes.

The built-in fonts have the characters of Windows code page 1252. Any other character, such as a Chinese one, is written
as ``<U+4E2D>``: no font is shipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT, MARGIN = 595, 842, 50
LEADING = 14
PER_PAGE = (HEIGHT - 2 * MARGIN) // LEADING
# Courier's characters all have six tenths of the size.
MAX_COLUMNS = (WIDTH - 2 * MARGIN) * 10 // (6 * 9)


class Row(NamedTuple):
    """One line of text. Bold rows are in Helvetica, all others in Courier, so that columns stand below each other."""

    text: str
    bold: bool = False


def document(rows: Sequence[Row]) -> bytes:
    """Returns the pages with these rows."""
    rows = [Row(part, row.bold) for row in rows for part in _wrapped(row.text)]
    pages = [rows[n : n + PER_PAGE] for n in range(0, max(1, len(rows)), PER_PAGE)]
    # Objects 1 to 4: catalog, page tree, both fonts. Then a page and its content, by turns.
    kids = " ".join(f"{5 + 2 * n} 0 R" for n in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} /MediaBox [0 0 {WIDTH} {HEIGHT}] >>".encode(),
        *(
            f"<< /Type /Font /Subtype /Type1 /BaseFont /{font} /Encoding /WinAnsiEncoding >>".encode()
            for font in ("Courier", "Helvetica-Bold")
        ),
    ]
    for n, page in enumerate(pages):
        content = _content(page)
        objects += [
            f"<< /Type /Page /Parent 2 0 R /Resources << /Font << /F1 3 0 R /F2 4 0 R >> >> "
            f"/Contents {6 + 2 * n} 0 R >>".encode(),
            f"<< /Length {len(content)} >>\nstream\n".encode() + content + b"\nendstream",
        ]
    return _file(objects)


def _content(rows: Sequence[Row]) -> bytes:
    out = [f"BT {LEADING} TL {MARGIN} {HEIGHT - MARGIN} Td".encode()]
    for row in rows:
        font = b"/F2 11 Tf" if row.bold else b"/F1 9 Tf"
        out.append(font + b" (" + _escaped(row.text) + b") Tj T*")
    return b"\n".join([*out, b"ET"])


def _escaped(text: str) -> bytes:
    shown = "".join(c if _known(c) else f"<U+{ord(c):04X}>" for c in text)
    return shown.encode("cp1252").replace(b"\\", b"\\\\").replace(b"(", b"\\(").replace(b")", b"\\)")


def _known(character: str) -> bool:
    try:
        return character.isprintable() and bool(character.encode("cp1252"))
    except UnicodeEncodeError:
        return False


def _wrapped(text: str) -> list[str]:
    """Splits a long text. The rest is indented."""
    found = [text[:MAX_COLUMNS]]
    rest = text[MAX_COLUMNS:]
    while rest:
        found.append("  " + rest[: MAX_COLUMNS - 2])
        rest = rest[MAX_COLUMNS - 2 :]
    return found


def _file(objects: Sequence[bytes]) -> bytes:
    out = bytearray(b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n")
    offsets = []
    for number, content in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n".encode() + content + b"\nendobj\n"
    table = len(out)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode()
    out += b"".join(f"{offset:010} 00000 n \n".encode() for offset in offsets)
    out += f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{table}\n%%EOF\n".encode()
    return bytes(out)
