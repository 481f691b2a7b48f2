"""Reads the title and the text of a web page, in a process of its own: ``python -m services.plugin.tools.pages CHARSET
LIMIT PARENT < PAGE``. It prints both as JSON, with the protections that the machine does not allow.

A hostile page may take its parser minutes, such as a tag with very many attributes, crash it, or take it over. It
affects only this process, which `confinement` has cut off from the machine.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import msgspec
from lxml import etree, html  # type: ignore[import-untyped]

import infra
from infra.observe.logs import get_logger
from infra.security import confinement

HTML = ("text/html", "application/xhtml+xml")
_UNSEEN = frozenset(("head", "script", "style", "noscript", "template", "svg"))
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DECLARED = re.compile(rb"<meta[^>]{0,200}charset|<\?xml[^>]{0,200}encoding", re.IGNORECASE)
_PRESCANNED_BYTES = 4_096
_XML_DECLARATION = re.compile(r"^\s*<\?xml[^>]{0,200}>")
# A page of 2 MB takes up to a second and 135 MB. The processes of MAX_READERS pages fit into the container.
CPU_SECONDS = 5
MEMORY_BYTES = 256 * 1024**2
MAX_READERS = 3
# Of the output of a process: a character beyond 16 bits as JSON, and all that it has beside the text.
_CHARACTER_BYTES, _OTHER_BYTES = 12, 16 * 1024
_log = get_logger("plugin.pages")
_ROOT = Path(infra.__file__).parent.parent


class UnreadablePage(Exception):
    """The page's process has reached its limits, or the page has crashed it or taken it over."""


async def read(kind: str, body: bytes, charset: str | None, limit: int) -> tuple[str, str]:
    """The title and the text of a page of this media type. See `read_page`. Raises UnreadablePage."""
    if kind not in HTML:
        return "", _decoded(body, charset)
    # Code of a page must not find the service's secrets in its memory.
    confinement.hide_memory()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.plugin.tools.pages", charset or "", str(limit), str(os.getpid())),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=_ROOT,
        # Without the service's variables, for the same reason.
        env={"PYTHONUTF8": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(body)
        process.stdin.close()
        said = await _all(process.stdout, _CHARACTER_BYTES * limit + _OTHER_BYTES)
        title, text, missing = msgspec.json.decode(said, type=tuple[str, str, list[str]])
    except ValueError:
        raise UnreadablePage from None
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        # asyncio waits for the end of the output, too, and it may have stopped to read it because there was much.
        while await process.stdout.read(2**16):
            pass
        await process.wait()
        # Without this asyncio reports a page that was not read to its end.
        with suppress(OSError):
            await process.stdin.wait_closed()
    if missing:
        _log.warning("page process is not fully confined", missing=missing)
    return title, text


async def _all(output: asyncio.StreamReader, most: int) -> bytes:
    """The whole output. Raises UnreadablePage if it has more than `most` bytes: a page that has taken its process over
    could write without end."""
    try:
        await output.readexactly(most + 1)
    except asyncio.IncompleteReadError as error:
        return error.partial
    raise UnreadablePage


def read_page(body: bytes, charset: str | None, limit: int) -> tuple[str, str]:
    """Returns the title and the text of a page. A text of more than `limit` characters is cut after one more.

    charset: as the HTTP header names it; without it the page's own declaration counts.
    """
    root = _parsed(body, charset)
    if root is None:
        return "", ""
    title = next(root.iter("title"), None)
    return " ".join("".join(title.itertext()).split())[:300] if title is not None else "", _text(root, limit)


def _parsed(body: bytes, charset: str | None) -> etree._Element | None:
    """Returns the root element. None for an empty page."""
    charset = charset or next((name for bom, name in _BOMS if body.startswith(bom)), None)
    encoding = None
    if charset:
        # The parser would follow an XML declaration of another encoding.
        body = _XML_DECLARATION.sub("", _decoded(body, charset), count=1).encode("utf-8", "replace")
        encoding = "utf-8"
    elif not _DECLARED.search(body, 0, _PRESCANNED_BYTES) and _is_utf8(body):
        encoding = "utf-8"
    # libxml2 parses faster than html.parser. huge_tree: without it, deeply nested parts are lost.
    parser = html.HTMLParser(encoding=encoding, huge_tree=True, remove_comments=True, remove_pis=True, no_network=True)
    try:
        # A NUL would end the page for the parser.
        return html.document_fromstring(body.replace(b"\0", b" "), parser=parser)
    except etree.ParserError:
        return None


def _text(root: etree._Element, limit: int) -> str:
    """Returns the visible pieces of text, one a line. Walks without recursion: a page may be nested without a limit."""
    pieces: list[str] = []
    length = 0
    walk = etree.iterwalk(root, events=("start", "end"))
    for event, element in walk:
        if event == "end":
            piece = element.tail
        elif element.tag in _UNSEEN:
            walk.skip_subtree()
            continue
        else:
            piece = element.text
        if piece and (piece := piece.strip()):
            pieces.append(piece)
            length += len(piece) + 1
            if length > limit:
                break
    return "\n".join(pieces)[: limit + 1]


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def _decoded(body: bytes, charset: str | None) -> str:
    try:
        return body.decode(charset or "utf-8", errors="replace")
    except (LookupError, UnicodeError):
        return body.decode(errors="replace")


def main(charset: str, limit: str, parent: str) -> None:
    confinement.limit(CPU_SECONDS, MEMORY_BYTES)
    missing = confinement.confine(int(parent))
    sys.stdout.write(json.dumps((*read_page(sys.stdin.buffer.read(), charset or None, int(limit)), missing)))


if __name__ == "__main__":
    main(*sys.argv[1:])
