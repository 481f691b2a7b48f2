"""An invoice as PDF/A-3, set by typst: the same data, the same bytes. As a program: JSON of a `Page` in, PDF out.

A process of its own prints each document, because typst keeps the memory that it once needed: a thousand megabytes for
an invoice with the most lines. The fonts are parts of packages and are embedded. They have Latin, Greek, Cyrillic,
Arabic, Hebrew, Devanagari, Thai, Hangul, Kana and Chinese characters. PDF/A wants a glyph for every character, so any
other one is shown as its number: ``[U+1F980]``.
"""

from __future__ import annotations

import asyncio
import re
import resource
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec

from infra.errors import TooLarge
from infra.service.one_each import OneEach

_ROOT = Path(__file__).parents[3]
_printing = asyncio.Semaphore(1)
one_each = OneEach("another PDF for you is being printed", timedelta(seconds=10))
"""A place in the row for one document of a tenant."""
PRINT_SECONDS = 120
# A document with the most lines takes a thousand megabytes.
MAX_MEMORY_BYTES = 1536 * 1024**2
# typst names all characters without a glyph at once. Another attempt is for those that it had joined to them.
MOST_ATTEMPTS = 3
_NO_GLYPH = re.compile(r'the text `"(.*)"` could not be displayed')
_ESCAPED = re.compile(r"\\u\{([0-9a-f]+)\}|\\(.)")


class Page(msgspec.Struct, frozen=True):
    """The texts of an invoice."""

    title: str
    head: list[str]
    lines: list[tuple[str, str, str, str, str]]
    """Number, description, quantity, price of one unit, amount."""
    totals: list[tuple[str, str]]
    """Name, amount."""
    total: str
    date: str
    """``2026-11-03``. It is the date of the file, too."""
    xml: str
    """The e-invoice that is attached. Empty: none."""


async def document(page: Page) -> bytes:
    """Returns the PDF. A process prints one document after the other.

    Raises TooLarge for one that takes more than PRINT_SECONDS.
    """
    try:
        async with _printing, asyncio.timeout(PRINT_SECONDS):
            return await _document(page)
    except TimeoutError:
        raise TooLarge(f"the invoice cannot be printed within {PRINT_SECONDS} s; its CSV has all lines") from None


async def _document(page: Page) -> bytes:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.billing.invoices.pdf",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=_ROOT,
        # Without the service's variables: it needs no secret.
        env={"PYTHONUTF8": "1"},
    )
    try:
        content, errors = await process.communicate(msgspec.json.encode(page))
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    if process.returncode:
        raise RuntimeError(f"could not print an invoice: {errors[-2000:].decode(errors='replace')}")
    return content


def _print() -> None:
    from services.billing.invoices import factur_x

    # Also if the service dies meanwhile.
    resource.setrlimit(resource.RLIMIT_CPU, (PRINT_SECONDS, PRINT_SECONDS))
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    page = msgspec.json.decode(sys.stdin.buffer.read(), type=Page)
    content = _compiled(page)
    sys.stdout.buffer.write(factur_x.mark(content) if page.xml else content)


def _compiled(page: Page) -> bytes:
    import pylopdf_fonts_ar
    import pylopdf_fonts_he
    import pylopdf_fonts_hi
    import pylopdf_fonts_ko
    import pylopdf_fonts_th
    import pylopdf_fonts_zh_cn
    import typst

    packages = (
        pylopdf_fonts_ar,
        pylopdf_fonts_he,
        pylopdf_fonts_hi,
        pylopdf_fonts_ko,
        pylopdf_fonts_th,
        pylopdf_fonts_zh_cn,
    )
    paths = [package.__path__[0] for package in packages]
    fonts = typst.Fonts(include_system_fonts=False, font_paths=paths)
    template = Path(__file__).with_name("invoice.typ").read_bytes()
    for _ in range(MOST_ATTEMPTS):
        data = msgspec.json.encode(page).decode()
        try:
            return typst.compile(template, sys_inputs={"data": data}, font_paths=fonts, pdf_standards=["a-3b"])
        except typst.TypstError as error:
            missing = _missing(error.diagnostic)
            if not missing:
                raise
        page = _without(page, missing)
    raise RuntimeError(f"characters that no font has remain after {MOST_ATTEMPTS} attempts")


def _missing(diagnostic: str) -> set[str]:
    """Returns the characters that typst has no glyph for; its message has them as a literal of Rust."""
    texts = "".join(_NO_GLYPH.findall(diagnostic))
    return set(_ESCAPED.sub(lambda found: chr(int(found[1], 16)) if found[1] else found[2], texts))


def _without(page: Page, missing: set[str]) -> Page:
    numbers = str.maketrans({character: f"[U+{ord(character):04X}]" for character in missing})

    def shown(texts: Any) -> Any:
        return texts.translate(numbers) if isinstance(texts, str) else [shown(text) for text in texts]

    drawn = msgspec.to_builtins(page)
    return msgspec.convert({name: text if name == "xml" else shown(text) for name, text in drawn.items()}, Page)


if __name__ == "__main__":
    _print()
