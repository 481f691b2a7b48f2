"""An invoice as PDF, set by typst: the same data, the same bytes. As a program: JSON of a `Page` in, PDF out.

A process of its own prints each document, because typst keeps the memory that it once needed: a thousand megabytes for
an invoice with the most lines. The fonts are parts of packages and are embedded. They have Latin, Greek, Cyrillic, Kana
and Chinese characters; any other one is shown as a box.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from pathlib import Path

import msgspec

_ROOT = Path(__file__).parents[2]
# A document may take a thousand megabytes.
_printing = asyncio.Semaphore(1)


class Page(msgspec.Struct, frozen=True):
    """The texts of an invoice."""

    title: str
    head: list[str]
    lines: list[tuple[str, str, str, str]]
    """Number, description, quantity, amount."""
    totals: list[tuple[str, str]]
    """Name, amount."""
    total: str


async def document(page: Page) -> bytes:
    """Returns the PDF. A process prints one document after the other."""
    async with _printing:
        return await _document(page)


async def _document(page: Page) -> bytes:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.billing.pdf",
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
    import pylopdf_fonts_zh_cn
    import typst

    fonts = typst.Fonts(include_system_fonts=False, font_paths=[str(pylopdf_fonts_zh_cn.serif_path().parent)])
    template = Path(__file__).with_name("invoice.typ").read_bytes()
    data = sys.stdin.buffer.read().decode()
    sys.stdout.buffer.write(typst.compile(template, sys_inputs={"data": data}, font_paths=fonts))


if __name__ == "__main__":
    _print()
