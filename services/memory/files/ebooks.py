"""Reads an e-book (EPUB 3, https://www.w3.org/TR/epub-33/): its chapters in the order in which a reader sees them."""

from __future__ import annotations

import posixpath
import zipfile
from collections.abc import Iterator
from typing import IO
from urllib.parse import unquote

from lxml import etree  # type: ignore[import-untyped]

from services.memory.domain import UnreadableFile
from services.memory.files import markup

_CONTAINER, _ENCRYPTION = "META-INF/container.xml", "META-INF/encryption.xml"
_PAGES = frozenset(("application/xhtml+xml", "text/html"))


def chapters(file: IO[bytes], warnings: list[str]) -> Iterator[str]:
    """Each chapter as Markdown. Adds to `warnings` the parts that are named and missing. Raises UnreadableFile."""
    with zipfile.ZipFile(file) as book:
        names = set(book.namelist())
        if _CONTAINER not in names:
            raise UnreadableFile(f"The e-book has no list of its parts ({_CONTAINER}).")
        package = next((node.get("full-path") for node in _nodes(_root(book, _CONTAINER), "rootfile")), None)
        if package not in names:
            raise UnreadableFile("The e-book names no package file, or one that is missing.")
        folder = posixpath.dirname(package)
        contents = _root(book, package)
        paths: dict[str | None, str] = {}
        for item in _nodes(contents, "item"):
            # The table of contents would repeat each heading.
            if item.get("media-type") in _PAGES and "nav" not in item.get("properties", "").split():
                paths[item.get("id")] = posixpath.normpath(posixpath.join(folder, unquote(item.get("href", ""))))
        encrypted = _encrypted(book) if _ENCRYPTION in names else set()
        # Each chapter once, as the standard says: a small file could repeat one a million times.
        for path in dict.fromkeys(paths.get(reference.get("idref")) for reference in _nodes(contents, "itemref")):
            if path in encrypted:
                raise UnreadableFile("The e-book is encrypted. Upload it without copy protection.")
            if path in names:
                yield markup.html_markdown(book.read(path))[0]
            elif path:
                warnings.append(f"A part of the e-book is missing: {path}.")


def _encrypted(book: zipfile.ZipFile) -> set[str]:
    return {unquote(node.get("URI", "")) for node in _nodes(_root(book, _ENCRYPTION), "CipherReference")}


def _root(book: zipfile.ZipFile, path: str) -> etree._Element:
    # Entities stay unresolved: an expanded one could fill the memory.
    return etree.fromstring(book.read(path), etree.XMLParser(resolve_entities=False, no_network=True))


def _nodes(root: etree._Element, name: str) -> Iterator[etree._Element]:
    return iter(root.findall(f".//{{*}}{name}"))
