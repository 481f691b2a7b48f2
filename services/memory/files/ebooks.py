"""Reads an e-book (EPUB 3, https://www.w3.org/TR/epub-33/): its chapters in the order in which a reader sees them. A
chapter without a heading has its title from the table of contents."""

from __future__ import annotations

import posixpath
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, NamedTuple
from urllib.parse import unquote

from lxml import etree  # type: ignore[import-untyped]

from services.memory.domain import MAX_HEADING, Block, UnreadableFile, sections
from services.memory.files import markup

_CONTAINER, _ENCRYPTION = "META-INF/container.xml", "META-INF/encryption.xml"
_PAGES = frozenset(("application/xhtml+xml", "text/html"))
# The table of contents before EPUB 3.
_OLDER_CONTENTS = "application/x-dtbncx+xml"
# Of titles below each other, as of headings.
_MAX_LEVELS = 6
_NAVIGATION_TYPE = "{http://www.idpf.org/2007/ops}type"


class _Title(NamedTuple):
    """An entry of the table of contents."""

    text: str
    path: str
    """Of its file; empty: it has none."""
    above: tuple[_Title, ...]
    """The entries above it, the outer one first."""


def blocks(file: IO[bytes], warnings: list[str]) -> Iterator[Block]:
    """The parts of each chapter. Adds to `warnings` the parts that are named and missing. Raises UnreadableFile."""
    with zipfile.ZipFile(file) as book:
        names = set(book.namelist())
        if _CONTAINER not in names:
            raise UnreadableFile(f"The e-book has no list of its parts ({_CONTAINER}).")
        package = next((node.get("full-path") for node in _nodes(_root(book, _CONTAINER), "rootfile")), None)
        if package not in names:
            raise UnreadableFile("The e-book names no package file, or one that is missing.")
        contents = _root(book, package)
        paths: dict[str | None, str] = {}
        listed: dict[str, dict[str, _Title]] = {}
        for item in _nodes(contents, "item"):
            part = _path(package, item.get("href", ""))
            # The table of contents would repeat each heading.
            if "nav" in item.get("properties", "").split() or item.get("media-type") == _OLDER_CONTENTS:
                listed = listed or (_titles(book, part) if part in names else {})
            elif item.get("media-type") in _PAGES:
                paths[item.get("id")] = part
        encrypted = _encrypted(book) if _ENCRYPTION in names else set()
        last: str | None = None
        # Each chapter once, as the standard says: a small file could repeat one a million times.
        for path in dict.fromkeys(paths.get(reference.get("idref")) for reference in _nodes(contents, "itemref")):
            if path in encrypted:
                raise UnreadableFile("The e-book is encrypted. Upload it without copy protection.")
            if path in names:
                for block in _chapter(book.read(path), path, listed.get(path, {})):
                    # A chapter may be several files, and only the first one is listed.
                    last = block.section or (last if listed else None)
                    yield block._replace(section=last)
            elif path:
                warnings.append(f"A part of the e-book is missing: {path}.")


def _chapter(content: bytes, path: str, titles: Mapping[str, _Title]) -> Iterator[Block]:
    above = next((title.above for title in titles.values()), ())
    outside = [title.text for title in above if title.path != path]
    headings = {
        id_: (min(max(1, 1 + len(each.above) - len(outside)), _MAX_LEVELS), each.text) for id_, each in titles.items()
    }
    for block in sections(markup.html_markdown(content, titles=headings)[0]):
        yield block._replace(section=" > ".join(filter(None, (*outside, block.section))) or None)


def _titles(book: zipfile.ZipFile, path: str) -> dict[str, dict[str, _Title]]:
    """The path of each listed file → the id of a place in it, empty for its beginning → the title."""
    parser = etree.XMLParser(resolve_entities=False, no_network=True, recover=True)
    root = etree.fromstring(book.read(path), parser)
    found: dict[str, dict[str, _Title]] = {}
    if root is None:
        return found
    entries: dict[etree._Element, _Title] = {}
    # Beside the chapters, a book may list its pages and tables.
    main = next((each for each in root.iter("{*}nav") if "toc" in each.get(_NAVIGATION_TYPE, "").split()), root)
    for entry in main.iter("{*}li", "{*}navPoint"):
        label = next(entry.iterchildren("{*}a", "{*}span", "{*}navLabel"), None)
        target = next(entry.iterchildren("{*}content"), label)
        if label is None or target is None:
            continue
        outer = next((entries[each] for each in entry.iterancestors("{*}li", "{*}navPoint") if each in entries), None)
        href, _, id_ = (target.get("href") or target.get("src") or "").partition("#")
        title = _Title(
            " ".join("".join(label.itertext()).split())[: MAX_HEADING // 2],
            _path(path, href) if href else "",
            (*outer.above, outer)[:_MAX_LEVELS] if outer else (),
        )
        entries[entry] = title
        if title.text:
            found.setdefault(title.path, {}).setdefault(unquote(id_), title)
    return found


def _path(base: str, href: str) -> str:
    """The path of a part to which another part refers."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(base), unquote(href.partition("#")[0])))


def _encrypted(book: zipfile.ZipFile) -> set[str]:
    return {unquote(node.get("URI", "")) for node in _nodes(_root(book, _ENCRYPTION), "CipherReference")}


def _root(book: zipfile.ZipFile, path: str) -> etree._Element:
    # Entities stay unresolved: an expanded one could fill the memory.
    return etree.fromstring(book.read(path), etree.XMLParser(resolve_entities=False, no_network=True))


def _nodes(root: etree._Element, name: str) -> Iterator[etree._Element]:
    return iter(root.findall(f".//{{*}}{name}"))
