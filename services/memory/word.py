"""Reads a Word document (ECMA-376): its body as HTML, and the lines of its headers and footers.

mammoth reads the body. It leaves out parts that a reader of the document sees: they are rewritten before as parts that
it knows.
"""

from __future__ import annotations

import io
import re
import zipfile
from typing import IO

from lxml import etree  # type: ignore[import-untyped]

_WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
_W = f"{{{_WORD}}}"
_M = "{http://schemas.openxmlformats.org/officeDocument/2006/math}"
_COMPATIBILITY = "{http://schemas.openxmlformats.org/markup-compatibility/2006}"
_SHAPE = "{urn:schemas-microsoft-com:vml}"
_BODY = re.compile(r"word/(?:document|footnotes|endnotes|comments)\d*\.xml")
_MARGIN = re.compile(r"word/(?:header|footer)\d*\.xml")
# The numbers of the page and of all pages.
_PAGE_NUMBER = re.compile(r"[\W_]*(?:\d{1,3}[\W_]*){0,2}")
_MARGIN_WORDS = (f"{_W}t", f"{_W}tab", f"{_W}br")
# The end of a tracked move, fields, text in the other direction, marked parts.
_WRAPPERS = tuple(_W + name for name in ("moveTo", "fldSimple", "bdo", "dir", "customXml"))
# Of a fraction and of powers and indices, the sign before the part.
_MATH_SIGNS = {f"{_M}den": "/", f"{_M}sup": "^", f"{_M}sub": "_"}
# Its parts have limits: a name may be long, and stand in many links.
_BACK = re.compile(r'<a href="#[^"]{0,100}-ref-[^"]{0,20}">↑</a>')
_REFERENCES = tuple(_W + name for name in ("footnoteReference", "endnoteReference", "commentReference"))
_OFF = ("0", "false", "off")


def html(file: IO[bytes]) -> str:
    import mammoth  # type: ignore[import-untyped]

    # Pictures are left out: in the text they would be long numbers.
    no_picture = mammoth.images.img_element(lambda image: {})
    done = mammoth.convert_to_html(_rewritten(file), convert_image=no_picture, style_map="comment-reference => sup")
    # The links from notes and comments back to their places.
    return _BACK.sub("", str(done.value))


def margins(file: IO[bytes]) -> str:
    """The lines of the headers and footers, each once."""
    lines: dict[str, None] = {}
    with zipfile.ZipFile(file) as archive:
        for name in sorted(filter(_MARGIN.fullmatch, archive.namelist())):
            for paragraph in _parsed(archive.read(name)).iter(f"{_W}p"):
                parts = paragraph.iter(*_MARGIN_WORDS)
                line = "".join(part.text or "" if part.tag == f"{_W}t" else " " for part in parts)
                if not _PAGE_NUMBER.fullmatch(line):
                    lines.setdefault(" ".join(line.split()))
    return "\n".join(lines)


def _parsed(part: bytes) -> etree._Element:
    # Without entities: a few of them could stand for gigabytes. huge_tree: a paragraph may be longer than 10 MB.
    return etree.fromstring(part, etree.XMLParser(resolve_entities=False, huge_tree=True))


def _rewritten(file: IO[bytes]) -> IO[bytes]:
    out = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(out, "w") as copy:
        for name in archive.namelist():
            if _BODY.fullmatch(name):
                root = _parsed(archive.read(name))
                _rewrite(root)
                copy.writestr(name, etree.tostring(root))
            elif not name.startswith(("word/media/", "word/embeddings/")):
                copy.writestr(name, archive.read(name))
    return out


def _rewrite(root: etree._Element) -> None:
    # Later parts of a wrapped part are found as well, so each list is made before its elements change.
    for run in list(root.iter(f"{_W}r")):
        hidden = run.find(f"{_W}rPr/{_W}vanish")
        if hidden is not None and hidden.get(f"{_W}val") not in _OFF:
            _remove(run)
    for equation in list(root.iter(f"{_M}oMath")):
        _replace(equation, _run(linear(equation)))
    for ruby in list(root.iter(f"{_W}ruby")):
        # The characters, and their pronunciation in brackets.
        base, above = ("".join(part.itertext()) for part in (ruby.find(f"{_W}rubyBase"), ruby.find(f"{_W}rt")))
        _replace(ruby, _text(f"{base}({above})"))
    _show_boxes(root)
    referred: set[tuple[str, str | None]] = set()
    for reference in list(root.iter(*_REFERENCES)):
        # Each note once: a small file could refer to one a million times.
        if (note := (reference.tag, reference.get(f"{_W}id"))) in referred:
            _remove(reference)
        referred.add(note)
    for line_break in list(root.iter(f"{_W}cr")):
        line_break.tag = f"{_W}br"
    for hyphen in list(root.iter(f"{_W}softHyphen")):
        _remove(hyphen)
    for wrapper in list(root.iter(f"{_M}oMathPara", *_WRAPPERS)):
        for properties in wrapper.findall(f"{_W}customXmlPr"):
            wrapper.remove(properties)
        _replace(wrapper, *wrapper)


def _show_boxes(root: etree._Element) -> None:
    """mammoth knows text boxes in the older form only. A document may have both forms of one box, or a picture of it as
    the older form. A drawing may have several boxes."""
    boxes: dict[etree._Element, list[etree._Element]] = {}
    for box in root.iter(f"{_W}txbxContent"):
        if (drawing := next(box.iterancestors(f"{_W}drawing"), None)) is not None:
            place = next(drawing.iterancestors(f"{_COMPATIBILITY}AlternateContent"), drawing)
            boxes.setdefault(place, []).append(box)
    for place, shown in boxes.items():
        older = place.find(f"{_COMPATIBILITY}Fallback")
        if older is None or next(older.iter(f"{_W}txbxContent"), None) is None:
            picture = etree.Element(f"{_W}pict")
            for box in shown:
                shape = etree.SubElement(picture, f"{_SHAPE}shape")
                etree.SubElement(shape, f"{_SHAPE}textbox").append(box)
            _replace(place, picture)


def linear(equation: etree._Element) -> str:
    """An equation on one line: ``E=mc^2``."""
    parts = []
    for node in equation.iter(f"{_M}t", *_MATH_SIGNS):
        parts.append(_MATH_SIGNS.get(node.tag) or node.text or "")
    return "".join(parts)


def _text(text: str) -> etree._Element:
    element = etree.Element(f"{_W}t")
    element.text = text
    return element


def _run(text: str) -> etree._Element:
    run = etree.Element(f"{_W}r")
    run.append(_text(text))
    return run


def _remove(element: etree._Element) -> None:
    element.getparent().remove(element)


def _replace(element: etree._Element, *by: etree._Element) -> None:
    # Without its place among its siblings, which would be counted again for each of many.
    for each in by:
        element.addprevious(each)
    _remove(element)
