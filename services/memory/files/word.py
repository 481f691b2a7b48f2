"""Reads a Word document (ECMA-376): its body as HTML, and the lines of its headers and footers.

mammoth reads the body. It leaves out parts that a reader of the document sees: they are rewritten before as parts that
it knows.
"""

from __future__ import annotations

import io
import posixpath
import re
import zipfile
from typing import IO

from lxml import etree  # type: ignore[import-untyped]

from services.memory.files import charts, numbering
from services.memory.files.markup import MAX_SPAN

_WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
_W = f"{{{_WORD}}}"
_M = "{http://schemas.openxmlformats.org/officeDocument/2006/math}"
_COMPATIBILITY = "{http://schemas.openxmlformats.org/markup-compatibility/2006}"
_SHAPE = "{urn:schemas-microsoft-com:vml}"
_RELATION = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}"
_RELATIONS = "word/_rels/document.xml.rels"
_DIAGRAM = "{http://schemas.openxmlformats.org/drawingml/2006/diagram}relIds"
_BODY = re.compile(r"word/(?:document|footnotes|endnotes|comments)\d*\.xml")
_STYLES = "word/styles.xml"
_NUMBERING = ("word/numbering.xml", _STYLES)
_MARGIN = re.compile(r"word/(?:header|footer)\d*\.xml")
# The numbers of the page and of all pages.
_PAGE_NUMBER = re.compile(r"[\W_]*(?:\d{1,3}[\W_]*){0,2}")
_MARGIN_WORDS = {f"{_W}tab": " ", f"{_W}ptab": " ", f"{_W}br": " ", f"{_W}noBreakHyphen": "-"}
# The end of a tracked move, fields, text in the other direction, marked parts.
_WRAPPERS = tuple(_W + name for name in ("moveTo", "fldSimple", "bdo", "dir", "customXml"))
# Of a fraction, of powers, indices and limits: the sign before the part, which is in brackets if it is longer than a
# number or a letter.
_MATH_SIGNS = {
    f"{_M}{name}": sign for name, sign in {"num": "", "den": "/", "sup": "^", "sub": "_", "lim": "_"}.items()
}
# The sign between the cells of a matrix, the rows of it, and equations below each other.
_MATH_PARTS = {f"{_M}{name}": sign for name, sign in {"mr": ", ", "eqArr": "; ", "m": "; "}.items()}
_ONE = re.compile(r"\d+(?:[.,]\d+)?|\w")
# Its parts have limits: a name may be long, and stand in many links.
_BACK = re.compile(r'<a href="#[^"]{0,100}-ref-[^"]{0,20}">↑</a>')
_REFERENCES = tuple(_W + name for name in ("footnoteReference", "endnoteReference", "commentReference"))
_OFF = ("0", "false", "off")
# Paragraphs of code: Word's own style, that of pandoc, and the name that people give. Together they are one block.
_CODE = "\n".join(
    f"p[style-name='{name}'] => pre:separator('\\n')" for name in ("HTML Preformatted", "Source Code", "Code")
)
# The levels of headings; 9 is that of text.
_HEADING_LEVELS = ("0", "1", "2", "3", "4", "5")
# How many styles of a chain are looked at. A style may be based on itself.
_MAX_BASED = 20


def html(file: IO[bytes]) -> str:
    import mammoth  # type: ignore[import-untyped]

    # Pictures are left out: in the text they would be long numbers.
    no_picture = mammoth.images.img_element(lambda image: {})
    styles = f"comment-reference => sup\n{_CODE}"
    done = mammoth.convert_to_html(_rewritten(file), convert_image=no_picture, style_map=styles)
    # The links from notes and comments back to their places.
    return _BACK.sub("", str(done.value))


def margins(file: IO[bytes]) -> str:
    """The lines of the headers and footers, each once."""
    lines: dict[str, None] = {}
    with zipfile.ZipFile(file) as archive:
        for name in sorted(filter(_MARGIN.fullmatch, archive.namelist())):
            for paragraph in _parsed(archive.read(name)).iter(f"{_W}p"):
                parts = paragraph.iter(f"{_W}t", *_MARGIN_WORDS)
                line = "".join(_MARGIN_WORDS.get(part.tag) or part.text or "" for part in parts)
                if not _PAGE_NUMBER.fullmatch(line):
                    lines.setdefault(" ".join(line.split()))
    return "\n".join(lines)


def _parsed(part: bytes) -> etree._Element:
    # Without entities: a few of them could stand for gigabytes. huge_tree: a paragraph may be longer than 10 MB.
    return etree.fromstring(part, etree.XMLParser(resolve_entities=False, huge_tree=True))


def _rewritten(file: IO[bytes]) -> IO[bytes]:
    out = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(out, "w") as copy:
        numbers = numbering.Numbers(*(_parsed(archive.read(part)) for part in _NUMBERING if part in archive.NameToInfo))
        for name in archive.namelist():
            if _BODY.fullmatch(name):
                root = _parsed(archive.read(name))
                _rewrite(root)
                if name == "word/document.xml":
                    _show_graphics(root, archive)
                    for paragraph in root.iter(f"{_W}p"):
                        if number := numbers.take(paragraph):
                            _show_number(paragraph, number)
                copy.writestr(name, etree.tostring(root))
            elif name == _STYLES:
                root = _parsed(archive.read(name))
                _name_headings(root)
                copy.writestr(name, etree.tostring(root))
            elif not name.startswith(("word/media/", "word/embeddings/")):
                copy.writestr(name, archive.read(name))
    return out


def _name_headings(styles: etree._Element) -> None:
    """mammoth knows headings by the names of Word's own styles. A style may be a heading by its level, or by the style
    on which it is based."""
    by_id = {style.get(f"{_W}styleId"): style for style in styles.iterfind(f"{_W}style")}
    for style in by_id.values():
        of, level = style, None
        for _ in range(_MAX_BASED):
            level = of.find(f"{_W}pPr/{_W}outlineLvl")
            based = of.find(f"{_W}basedOn")
            if level is not None or based is None or based.get(f"{_W}val") not in by_id:
                break
            of = by_id[based.get(f"{_W}val")]
        name = style.find(f"{_W}name")
        if name is not None and level is not None and level.get(f"{_W}val") in _HEADING_LEVELS:
            name.set(f"{_W}val", f"heading {int(level.get(f'{_W}val')) + 1}")


def _rewrite(root: etree._Element) -> None:
    # Later parts of a wrapped part are found as well, so each list is made before its elements change.
    for run in list(root.iter(f"{_W}r")):
        hidden = run.find(f"{_W}rPr/{_W}vanish")
        if hidden is not None and hidden.get(f"{_W}val") not in _OFF:
            _remove(run)
    for equation in list(root.iter(f"{_M}oMath")):
        following = equation.getnext()
        is_torn = following is not None and following.tag == f"{_M}oMath"
        _replace(equation, _run(linear(equation) + " " * is_torn))
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
    for line_break in list(root.iter(f"{_W}cr", f"{_W}br")):
        # The end of a page or column ends a word, too.
        line_break.tag = f"{_W}br"
        line_break.attrib.clear()
    for before in list(root.iter(f"{_W}gridBefore")):
        # The row begins further right: mammoth would put its cells below the first columns.
        count = before.get(f"{_W}val") or ""
        if count.isdecimal() and 0 < int(count[:5]) <= MAX_SPAN:
            cell = etree.Element(f"{_W}tc")
            etree.SubElement(etree.SubElement(cell, f"{_W}tcPr"), f"{_W}gridSpan").set(f"{_W}val", count)
            before.getparent().addnext(cell)
    for tab in list(root.iter(f"{_W}ptab")):
        tab.tag = f"{_W}tab"
    for choice in list(root.iter(f"{_W}ddList")):
        # Of an older form. The chosen entry stands in the properties of its field.
        chosen = choice.find(f"{_W}result")
        at = "0" if chosen is None else chosen.get(f"{_W}val") or "0"
        for entry in choice.findall(f"{_W}listEntry")[int(at) : int(at) + 1] if at.isdecimal() else ():
            next(choice.iterancestors(f"{_W}r")).addprevious(_run(entry.get(f"{_W}val") or ""))
    for raised in list(root.iter(f"{_W}position")):
        if (raised.get(f"{_W}val") or "0").strip("0").isdecimal():
            etree.SubElement(raised.getparent(), f"{_W}vertAlign").set(f"{_W}val", "superscript")
    for hyphen in list(root.iter(f"{_W}softHyphen")):
        _remove(hyphen)
    for wrapper in list(root.iter(f"{_M}oMathPara", *_WRAPPERS)):
        for properties in wrapper.findall(f"{_W}customXmlPr"):
            wrapper.remove(properties)
        _replace(wrapper, *wrapper)


def _show_number(paragraph: etree._Element, number: str) -> None:
    """mammoth counts from 1 after each paragraph between, and writes neither letters nor the numbers of clauses."""
    if next(paragraph.iter(f"{_W}t"), None) is None:
        return
    properties = paragraph.find(f"{_W}pPr")
    own = properties.find(f"{_W}numPr")
    if own is not None:
        properties.remove(own)
    # The list of a style holds too, unless the paragraph names a list that does not exist.
    own = etree.SubElement(properties, f"{_W}numPr")
    for name in ("ilvl", "numId"):
        etree.SubElement(own, f"{_W}{name}").set(f"{_W}val", "0")
    properties.addnext(_run(f"{number} "))


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


def _show_graphics(root: etree._Element, archive: zipfile.ZipFile) -> None:
    """Adds the values of each chart as a table behind its paragraph, and the lines of each diagram (SmartArt); each
    once, as notes."""
    related = _parsed(archive.read(_RELATIONS)) if _RELATIONS in archive.NameToInfo else ()
    parts = {
        each.get("Id"): posixpath.normpath(posixpath.join("/word", each.get("Target", "")))[1:] for each in related
    }
    for graphic in list(root.iter(f"{charts.CHART}chart", _DIAGRAM)):
        part = parts.pop(graphic.get(f"{_RELATION}{'dm' if graphic.tag == _DIAGRAM else 'id'}"), None)
        paragraph = next(graphic.iterancestors(f"{_W}p"), None)
        if part not in archive.NameToInfo or paragraph is None:
            continue
        shown = _parsed(archive.read(part))
        if graphic.tag == _DIAGRAM:
            for line in reversed(list(charts.lines(shown))):
                paragraph.addnext(_paragraph(line))
            continue
        title, cells = charts.read(shown)
        table = etree.Element(f"{_W}tbl")
        for row in cells:
            line = etree.SubElement(table, f"{_W}tr")
            for cell in row:
                etree.SubElement(line, f"{_W}tc").append(_paragraph(cell))
        paragraph.addnext(table)
        for named in reversed(title.split("\n")):
            paragraph.addnext(_paragraph(named))


def linear(equation: etree._Element) -> str:
    """An equation on one line, close to UnicodeMath: ``E=mc^2``, ``(a+b)/√(2c)``."""
    out = _Linear()
    for event, node in etree.iterwalk(equation, events=("start", "end")):
        (out.begin if event == "start" else out.end)(node)
    return "".join(out.pieces)


class _Linear:
    def __init__(self) -> None:
        self.pieces: list[str] = []
        self._open: list[int] = []
        """The places of the brackets of the open parts, which are empty until their ends are known."""
        self._closed = -1
        """The place of the bracket that the last piece closes; -1: it closes none."""

    def begin(self, node: etree._Element) -> None:
        tag, parent = node.tag, node.getparent()
        if tag == f"{_M}t":
            self._add(node.text or "")
        elif tag == f"{_M}nary":
            self._add(_sign(node, "nary", "chr", "∫"))
        elif tag == f"{_M}rad":
            self._add("√")
        elif tag == f"{_M}d":
            self._open.append(len(self.pieces))
            self._add(_sign(node, "d", "begChr", "("))
        elif tag in _MATH_SIGNS or (tag == f"{_M}e" and parent.tag == f"{_M}rad"):
            self._add(_MATH_SIGNS.get(tag, ""))
            self._open.append(len(self.pieces))
            self._add("")
        elif tag in (f"{_M}e", f"{_M}mr"):
            if parent.tag in (f"{_M}nary", f"{_M}func"):
                self._add(" ")
            elif (before := node.getprevious()) is not None and before.tag == tag:
                self._add(_MATH_PARTS.get(parent.tag) or _sign(parent, "d", "sepChr", "|"))
        elif tag == f"{_M}deg" and _has_text(node):
            self._add("[")

    def end(self, node: etree._Element) -> None:
        tag = node.tag
        if tag == f"{_M}deg" and _has_text(node):
            self._add("]")
        elif tag == f"{_M}d":
            self._add(_sign(node, "d", "endChr", ")"))
            self._closed = self._open.pop()
        elif tag in _MATH_SIGNS or (tag == f"{_M}e" and node.getparent().tag == f"{_M}rad"):
            at = self._open.pop()
            is_one = len(self.pieces) == at + 2 and _ONE.fullmatch(self.pieces[-1])
            if len(self.pieces) > at + 1 and not is_one and self._closed != at + 1:
                self.pieces[at] = "("
                self._add(")")
                self._closed = at

    def _add(self, piece: str) -> None:
        self.pieces.append(piece)
        self._closed = -1


def _has_text(node: etree._Element) -> bool:
    return next(node.iter(f"{_M}t"), None) is not None


def _sign(node: etree._Element, kind: str, name: str, default: str) -> str:
    """A sign among the properties of a part of an equation. One without a value is absent."""
    found = node.find(f"{_M}{kind}Pr/{_M}{name}")
    return default if found is None else (found.get(f"{_M}val") or "")[:1]


def _text(text: str) -> etree._Element:
    element = etree.Element(f"{_W}t")
    element.set("{http://www.w3.org/XML/1998/namespace}space", "preserve")
    element.text = text
    return element


def _paragraph(text: str) -> etree._Element:
    paragraph = etree.Element(f"{_W}p")
    paragraph.append(_run(text))
    return paragraph


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
