"""Small real files, made by libraries if one exists, else by hand."""

from __future__ import annotations

import io
import struct
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import tooling.testing

HANDBOOK = Path(tooling.testing.__file__).parent / "handbook"
WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def handbook(language: str) -> bytes:
    """``en`` or ``zh``."""
    return (HANDBOOK / f"norrland-linnea-2.{language}.md").read_bytes()


def pdf(pages: Sequence[str], *, encrypted: bool = False) -> bytes:
    """A PDF (ISO 32000) with one line of text per page, in Latin or Chinese; `encrypted` asks for a password."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", ""]
    kids = []
    for text in pages:
        latin = text.isascii()
        font = (
            "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
            if latin
            else "<< /Type /Font /Subtype /Type0 /BaseFont /STSong-Light /Encoding /UniGB-UCS2-H /DescendantFonts "
            "[<< /Type /Font /Subtype /CIDFontType0 /BaseFont /STSong-Light "
            "/CIDSystemInfo << /Registry (Adobe) /Ordering (GB1) /Supplement 4 >> >>] >>"
        )
        shown = f"({text})" if latin else f"<{text.encode('utf-16-be').hex()}>"
        content = f"BT /F1 12 Tf 40 700 Td {shown} Tj ET"
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 2000 792] /Contents {len(objects) + 2} 0 R "
            f"/Resources << /Font << /F1 {len(objects) + 3} 0 R >> >> >>",
            f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
            font,
        ]
        kids.append(f"{len(objects) - 2} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    trailer = "/Root 1 0 R"
    if encrypted:
        objects.append(
            f"<< /Filter /Standard /V 1 /R 2 /P -4 /O <{'ab' * 32}> /U <{'cd' * 32}> >>",
        )
        trailer += f" /Encrypt {len(objects)} 0 R /ID [<{'12' * 16}> <{'12' * 16}>]"
    return assembled(objects, trailer)


def assembled(objects: Sequence[str], trailer: str = "/Root 1 0 R") -> bytes:
    """A PDF of these objects, numbered from 1."""
    out = io.BytesIO(b"%PDF-1.7\n")
    out.seek(0, io.SEEK_END)
    offsets = []
    for number, body in enumerate(objects, 1):
        offsets.append(out.tell())
        out.write(f"{number} 0 obj\n{body}\nendobj\n".encode())
    start = out.tell()
    out.write(f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode())
    out.writelines(f"{offset:010} 00000 n \n".encode() for offset in offsets)
    out.write(f"trailer\n<< /Size {len(objects) + 1} {trailer} >>\nstartxref\n{start}\n%%EOF\n".encode())
    return out.getvalue()


def scan(pages: Sequence[str]) -> bytes:
    """A PDF whose pages are pictures of text, in Latin or Chinese. A page for an empty text has one that is no
    picture."""
    import pylopdf_fonts_zh_cn
    import typst

    fonts = typst.Fonts(include_system_fonts=False, font_paths=[str(pylopdf_fonts_zh_cn.serif_path().parent)])
    setting = '#set page(width: 15cm, height: 6cm, margin: 1cm)\n#set text(font: "Noto Serif SC", size: 14pt)\n'
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "scan.typ"
        shown = []
        for n, page in enumerate(pages):
            source.write_text(setting + page)
            (Path(folder) / f"{n}.png").write_bytes(typst.compile(source, format="png", ppi=200, font_paths=fonts))
            shown.append(f'#image("{n}.png", width: 100%)' if page else "This page has text.")
        source.write_text("#set page(width: 15cm, height: 6cm, margin: 0cm)\n" + "\n#pagebreak()\n".join(shown))
        return bytes(typst.compile(source, font_paths=fonts))


def docx(heading: str, text: str) -> bytes:
    """A Word document (ECMA-376) of one heading and one paragraph."""
    document = (
        f'<?xml version="1.0" encoding="UTF-8"?><w:document xmlns:w="{WORD}"><w:body>'
        f'<w:p><w:pPr><w:pStyle w:val="Heading1"/></w:pPr><w:r><w:t>{heading}</w:t></w:r></w:p>'
        f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p></w:body></w:document>"
    )
    parts = {
        "[Content_Types].xml": '<?xml version="1.0"?><Types '
        'xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        '<Override PartName="/word/document.xml" ContentType='
        '"application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/></Types>',
        "_rels/.rels": '<?xml version="1.0"?><Relationships '
        'xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship Id="r1" Type='
        '"http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument" '
        'Target="word/document.xml"/></Relationships>',
        "word/document.xml": document,
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return out.getvalue()


def pptx(slides: Sequence[tuple[str, str]]) -> bytes:
    """A presentation: title and text of each slide."""
    from pptx import Presentation

    presentation = Presentation()
    for title, text in slides:
        slide = presentation.slides.add_slide(presentation.slide_layouts[1])
        slide.shapes.title.text = title
        slide.placeholders[1].text = text
    out = io.BytesIO()
    presentation.save(out)
    return out.getvalue()


def xlsx(sheet: str, rows: Sequence[Sequence[object]]) -> bytes:
    """A workbook of one sheet."""
    from openpyxl import Workbook  # type: ignore[import-untyped]

    book = Workbook()
    book.active.title = sheet
    for row in rows:
        book.active.append(row)
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


def epub(parts: Mapping[str, str], *, encrypted: str = "") -> bytes:
    """An e-book: the path of each chapter and its page, in order; `encrypted` names a chapter with copy protection."""
    names = list(parts)
    items = "".join(
        f'<item id="c{n}" href="{name}" media-type="application/xhtml+xml"/>' for n, name in enumerate(names)
    )
    spine = "".join(f'<itemref idref="{id_}"/>' for id_ in ("toc", *(f"c{n}" for n in range(len(names)))))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("mimetype", "application/epub+zip")
        archive.writestr(
            "META-INF/container.xml",
            '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
            '<rootfile full-path="OEBPS/book.opf"/></rootfiles></container>',
        )
        archive.writestr(
            "OEBPS/book.opf",
            '<package xmlns="http://www.idpf.org/2007/opf"><manifest>'
            f'<item id="toc" href="toc.xhtml" media-type="application/xhtml+xml" properties="nav"/>{items}'
            f"</manifest><spine>{spine}</spine></package>",
        )
        archive.writestr("OEBPS/toc.xhtml", "<html><body><nav>the table of contents</nav></body></html>")
        for name, page in parts.items():
            if page:
                archive.writestr(f"OEBPS/{name}", page)
        if encrypted:
            archive.writestr(
                "META-INF/encryption.xml",
                '<encryption xmlns:e="http://www.w3.org/2001/04/xmlenc#">'
                f'<e:CipherReference URI="OEBPS/{encrypted}"/></encryption>',
            )
    return out.getvalue()


Tree = Mapping[str, "bytes | Tree"]
"""Streams and storages of a compound file by their names."""
_END, _NONE = 0xFFFFFFFE, 0xFFFFFFFF


def compound(tree: Tree) -> bytes:
    """A compound file (MS-CFB, version 3) of streams that are shorter than 4 KiB."""
    small = b""
    chain: list[int] = []
    # Name, kind, right sibling, child, first sector, length.
    entries: list[tuple[str, int, int, int, int, int]] = [("Root Entry", 5, _NONE, _NONE, 1, 0)]

    def add(folder: Tree) -> int:
        """The number of the first entry of the folder. Each entry has the next one on its right."""
        nonlocal small
        following = _NONE
        for name, content in sorted(folder.items(), key=lambda item: (len(item[0]), item[0].upper()), reverse=True):
            if isinstance(content, bytes):
                begin, count = len(small) // 64, -(-len(content) // 64)
                chain.extend([*range(begin + 1, begin + count), _END] if count else [])
                small += content.ljust(64 * count, b"\0")
                entries.append((name, 2, following, _NONE, begin if count else _END, len(content)))
            else:
                child = add(content)
                entries.append((name, 1, following, child, 0, 0))
            following = len(entries) - 1
        return following

    first = add(tree)
    entries[0] = "Root Entry", 5, _NONE, first, 1, len(small)
    directory = b"".join(
        struct.pack("<64sHBBIII36xIQ", name.encode("utf-16-le"), 2 * len(name) + 2, kind, 1, _NONE, right, child, *of)
        for name, kind, right, child, *of in entries
    )
    parts = [small, directory, struct.pack(f"<{len(chain)}I", *chain)]
    # The first sector is the table of sectors itself.
    table, starts = [0xFFFFFFFD], []
    for part in parts:
        starts.append(len(table))
        table += [*range(len(table) + 1, len(table) - (-len(part) // 512)), _END]
    names = (0x3E, 3, 0xFFFE, 9, 6)
    places = (0, 1, starts[1], 0, 4096, starts[2], len(table) - starts[2], _END, 0, 0)
    header = struct.pack("<8s16x5H6x10I", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", *names, *places)
    sectors = [header.ljust(512, b"\xff"), struct.pack(f"<{len(table)}I", *table).ljust(512, b"\xff")]
    return b"".join(sectors + [part.ljust(-(-len(part) // 512) * 512, b"\xff") for part in parts])


def outlook(properties: Mapping[str, str | bytes | int], *attachments: Tree, is_enclosed: bool = False) -> Tree:
    """The storage of an e-mail (MS-OXMSG): its properties by tag with type, and its attachments."""
    numbers = {int(tag, 16): value for tag, value in properties.items() if isinstance(value, int)}
    rows = b"".join(struct.pack("<IIQ", tag, 6, value) for tag, value in numbers.items())
    streams: dict[str, bytes | Tree] = {
        f"__substg1.0_{tag}": value.encode("utf-16-le") if isinstance(value, str) else value
        for tag, value in properties.items()
        if not isinstance(value, int)
    }
    streams["__properties_version1.0"] = bytes(24 if is_enclosed else 32) + rows
    return streams | {f"__attach_version1.0_#{n:08X}": attachment for n, attachment in enumerate(attachments)}


def added(office: bytes, part: str) -> bytes:
    """An Office file with one part more."""
    out = io.BytesIO(office)
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr(part, b"x")
    return out.getvalue()


def damaged(office: bytes, part: str) -> bytes:
    """An Office file with one part whose XML is cut off."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(office)) as whole, zipfile.ZipFile(out, "w") as archive:
        for name in whole.namelist():
            content = whole.read(name)
            archive.writestr(name, content[: len(content) // 2] if name == part else content)
    return out.getvalue()
