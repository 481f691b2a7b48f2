"""Parts of files that libraries leave out or tear apart are read as the file shows them."""

from __future__ import annotations

import base64
import datetime as dt
import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from infra.stores import filetypes as types
from tests.services.memory import files
from tests.services.memory.files.test_parsing import parse

RELATIONS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
NAMES = {
    "w": files.WORD,
    "mc": "http://schemas.openxmlformats.org/markup-compatibility/2006",
    "wps": "http://schemas.microsoft.com/office/word/2010/wordprocessingShape",
    "v": "urn:schemas-microsoft-com:vml",
    "m": "http://schemas.openxmlformats.org/officeDocument/2006/math",
    "a": "http://schemas.openxmlformats.org/drawingml/2006/main",
}
PIXEL = base64.b64decode("R0lGODlhAQABAIAAAAAAAP///ywAAAAAAQABAAACAUwAOw==")
DECLARED = " ".join(f'xmlns:{name}="{uri}"' for name, uri in NAMES.items())


def text_of(content: bytes, type_: str) -> str:
    return "\n".join(line["text"] for line in parse(content, type_) if "text" in line)


def paragraph(text: str) -> str:
    return f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>"


def docx(body: str, parts: Mapping[str, str] | None = None) -> bytes:
    """A Word document with this body, and with parts such as ``footnotes`` by their names."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(files.docx("", ""))) as plain, zipfile.ZipFile(out, "w") as document:
        for name in plain.namelist()[:2]:
            document.writestr(name, plain.read(name))
        document.writestr("word/document.xml", f"<w:document {DECLARED}><w:body>{body}</w:body></w:document>")
        relations = ""
        for name, content in (parts or {}).items():
            document.writestr(f"word/{name}.xml", f"<w:{name} {DECLARED}>{content}</w:{name}>")
            relations += f'<Relationship Id="{name}" Type="{RELATIONS}/{name}" Target="{name}.xml"/>'
        space = "http://schemas.openxmlformats.org/package/2006/relationships"
        document.writestr("word/_rels/document.xml.rels", f'<Relationships xmlns="{space}">{relations}</Relationships>')
    return out.getvalue()


def _t(text: str) -> str:
    return f"<m:r><m:t>{text}</m:t></m:r>"


def _d(text: str, properties: str = "") -> str:
    return f"<m:d><m:dPr>{properties}</m:dPr><m:e>{_t(text)}</m:e></m:d>"


EQUATIONS = {
    "2(a+b)": _t("2") + _d("a+b"),
    "(x+1)^(2n+1)": f"<m:sSup><m:e>{_d('x+1')}</m:e><m:sup>{_t('2n+1')}</m:sup></m:sSup>",
    "(P+Q)/(2V)": f"<m:f><m:num>{_t('P+Q')}</m:num><m:den>{_t('2V')}</m:den></m:f>",
    "(a)/c": f"<m:f><m:num>{_d('a')}</m:num><m:den>{_t('c')}</m:den></m:f>",
    "√(2gh)": f"<m:rad><m:radPr/><m:deg/><m:e>{_t('2gh')}</m:e></m:rad>",
    "√[3]x": f"<m:rad><m:deg>{_t('3')}</m:deg><m:e>{_t('x')}</m:e></m:rad>",
    "∑_(i=1)^n i": (
        f"<m:nary><m:naryPr><m:chr m:val='∑'/></m:naryPr><m:sub>{_t('i=1')}</m:sub><m:sup>{_t('n')}</m:sup>"
        f"<m:e>{_t('i')}</m:e></m:nary>"
    ),
    "|x|": _d("x", "<m:begChr m:val='|'/><m:endChr m:val='|'/>"),
    "{x; -x": (
        f"<m:d><m:dPr><m:begChr m:val='{{'/><m:endChr m:val=''/></m:dPr><m:e><m:eqArr><m:e>{_t('x')}</m:e>"
        f"<m:e>{_t('-x')}</m:e></m:eqArr></m:e></m:d>"
    ),
    "[1, 0; 0, 1]": (
        "<m:d><m:dPr><m:begChr m:val='['/><m:endChr m:val=']'/></m:dPr><m:e><m:m>"
        + "".join(f"<m:mr><m:e>{_t(a)}</m:e><m:e>{_t(b)}</m:e></m:mr>" for a, b in ("10", "01"))
        + "</m:m></m:e></m:d>"
    ),
    "sin x": f"<m:func><m:fName>{_t('sin')}</m:fName><m:e>{_t('x')}</m:e></m:func>",
}
BOX = f"<w:txbxContent>{paragraph('in a box')}</w:txbxContent>"
WSP = f"<wps:wsp><wps:txbx>{BOX}</wps:txbx></wps:wsp>"
NEW_BOX = f"<w:drawing><a:graphic>{WSP}</a:graphic></w:drawing>"
OLD_BOX = f"<w:pict><v:shape><v:textbox>{BOX}</v:textbox></v:shape></w:pict>"
WORDS = {
    "tracked move": (
        "<w:p><w:moveFrom><w:r><w:t>moved</w:t></w:r></w:moveFrom></w:p>"
        "<w:p><w:moveTo><w:r><w:t>moved</w:t></w:r></w:moveTo></w:p>",
        "moved",
    ),
    "box in the new form": (f"<w:p><w:r>{NEW_BOX}</w:r></w:p>", "in a box"),
    "box in both forms": (
        f"<w:p><w:r><mc:AlternateContent><mc:Choice Requires='wps'>{NEW_BOX}</mc:Choice>"
        f"<mc:Fallback>{OLD_BOX}</mc:Fallback></mc:AlternateContent></w:r></w:p>",
        "in a box",
    ),
    "box with a picture as its older form": (
        f"<w:p><w:r><mc:AlternateContent><mc:Choice Requires='wps'>{NEW_BOX}</mc:Choice>"
        "<mc:Fallback><w:pict><v:shape/></w:pict></mc:Fallback></mc:AlternateContent></w:r></w:p>",
        "in a box",
    ),
    "boxes of one drawing": (
        f"<w:p><w:r><w:drawing><a:graphic>{WSP}{WSP}</a:graphic></w:drawing></w:r></w:p>",
        "in a box\n\nin a box",
    ),
    "boxes of two drawings in one choice": (
        f"<w:p><w:r><mc:AlternateContent><mc:Choice Requires='wpg'>{NEW_BOX}{NEW_BOX}</mc:Choice>"
        "</mc:AlternateContent></w:r></w:p>",
        "in a box\n\nin a box",
    ),
    "field": ("<w:p><w:fldSimple w:instr='DATE'><w:r><w:t>4 May</w:t></w:r></w:fldSimple></w:p>", "4 May"),
    "marked part": (
        "<w:p><w:customXml><w:customXmlPr/><w:bdo><w:r><w:t>marked</w:t></w:r></w:bdo></w:customXml></w:p>",
        "marked",
    ),
    "equation": (
        "<w:p><m:oMathPara><m:oMath><m:r><m:t>E=m</m:t></m:r><m:sSup><m:e><m:r><m:t>c</m:t></m:r></m:e>"
        "<m:sup><m:r><m:t>2</m:t></m:r></m:sup></m:sSup></m:oMath></m:oMathPara></w:p>",
        "E=mc^2",
    ),
    "equations": (f"<w:p><m:oMath>{_t('a=b')}</m:oMath><m:oMath>{_t('c=d')}</m:oMath></w:p>", "a=b c=d"),
    **{f"equation {text}": (f"<w:p><m:oMath>{equation}</m:oMath></w:p>", text) for text, equation in EQUATIONS.items()},
    "hyphens and tabs": (
        "<w:p><w:r><w:t>NL2</w:t><w:noBreakHyphen/><w:t>230</w:t><w:ptab/><w:t>x</w:t></w:r></w:p>",
        "NL2-230 x",
    ),
    "power": (
        "<w:p><w:r><w:t>10</w:t></w:r><w:r><w:rPr><w:vertAlign w:val='superscript'/></w:rPr><w:t>-6</w:t></w:r>"
        "<w:r><w:t> m</w:t></w:r><w:r><w:rPr><w:vertAlign w:val='superscript'/></w:rPr><w:t>2</w:t></w:r></w:p>",
        "10^-6 m2",
    ),
    "raised by its position": (
        "<w:p><w:r><w:rPr><w:position w:val='0'/></w:rPr><w:t>10</w:t></w:r><w:r><w:rPr><w:position w:val='6'/></w:rPr>"
        "<w:t>6</w:t></w:r></w:p>",
        "10^6",
    ),
    "chosen entry of an older form": (
        "<w:p><w:r><w:fldChar w:fldCharType='begin'><w:ffData><w:ddList><w:result w:val='1'/><w:listEntry w:val='Red'/>"
        "<w:listEntry w:val='Blue'/></w:ddList></w:ffData></w:fldChar></w:r><w:r><w:instrText> FORMDROPDOWN "
        "</w:instrText></w:r><w:r><w:fldChar w:fldCharType='end'/></w:r><w:r><w:t> car</w:t></w:r></w:p>",
        "Blue car",
    ),
    "pronunciation": (
        "<w:p><w:r><w:ruby><w:rt><w:r><w:t>とう</w:t></w:r></w:rt>"
        "<w:rubyBase><w:r><w:t>東</w:t></w:r></w:rubyBase></w:ruby></w:r></w:p>",
        "東(とう)",
    ),
    "hidden text": (
        "<w:p><w:r><w:rPr><w:vanish/></w:rPr><w:t>hidden </w:t></w:r><w:r><w:rPr><w:vanish w:val='0'/></w:rPr>"
        "<w:t>seen</w:t></w:r></w:p>",
        "seen",
    ),
    "breaks": (
        "<w:p><w:r><w:t>main</w:t><w:softHyphen/><w:t>tenance</w:t><w:cr/><w:t>x</w:t><w:br w:type='page'/>"
        "<w:t>y</w:t></w:r></w:p>",
        "maintenance\nx\ny",
    ),
}


@pytest.mark.parametrize(("body", "text"), WORDS.values(), ids=WORDS)
def test_parts_of_a_word_document_are_read_as_it_shows_them(body: str, text: str) -> None:
    assert text_of(docx(body), types.DOCX) == text


def test_notes_and_comments_of_a_word_document_stand_at_its_end() -> None:
    body = (
        "<w:p><w:r><w:t>text</w:t></w:r><w:r><w:footnoteReference w:id='2'/></w:r>"
        "<w:r><w:commentReference w:id='0'/></w:r></w:p>"
    )
    parts = {
        "footnotes": f"<w:footnote w:id='2'>{paragraph('a footnote')}</w:footnote>",
        "comments": f"<w:comment w:id='0' w:initials='A'>{paragraph('a comment')}</w:comment>",
    }
    lines = text_of(docx(body, parts), types.DOCX).split("\n")
    assert [line for line in lines if line] == ["text[1][A1]", "1. a footnote", "Comment [A1]", "a comment"]


def _level(at: int, form: str, text: str, more: str = "") -> str:
    return (
        f"<w:lvl w:ilvl='{at}'><w:start w:val='1'/><w:numFmt w:val='{form}'/>{more}<w:lvlText w:val='{text}'/></w:lvl>"
    )


CLAUSE = "<w:pStyle w:val='Clause'/>"
NUMBERING = (
    f"<w:abstractNum w:abstractNumId='0'>{_level(0, 'decimal', '%1.', CLAUSE)}"
    f"{_level(1, 'lowerLetter', '%1.%2)')}</w:abstractNum>"
    f"<w:abstractNum w:abstractNumId='1'>{_level(0, 'chineseCounting', '第%1条')}</w:abstractNum>"
    f"<w:abstractNum w:abstractNumId='2'>{_level(0, 'bullet', '•')}</w:abstractNum>"
    f"<w:abstractNum w:abstractNumId='3'>{_level(0, 'upperRoman', 'x' * 101 + '%1')}</w:abstractNum>"
    + "".join(f"<w:num w:numId='{n + 1}'><w:abstractNumId w:val='{n}'/></w:num>" for n in range(4))
    + "<w:num w:numId='5'><w:abstractNumId w:val='0'/><w:lvlOverride w:ilvl='0'><w:startOverride w:val='7'/>"
    "</w:lvlOverride></w:num>"
)
STYLES = (
    "<w:style w:type='paragraph' w:styleId='Clause'><w:pPr><w:numPr><w:numId w:val='1'/></w:numPr></w:pPr></w:style>"
    "<w:style w:type='paragraph' w:styleId='Sub'><w:basedOn w:val='Clause'/></w:style>"
)


def _item(text: str, list_: int | None = None, level: int = 0, style: str = "") -> str:
    named = "" if list_ is None else f"<w:numPr><w:ilvl w:val='{level}'/><w:numId w:val='{list_}'/></w:numPr>"
    styled = f"<w:pStyle w:val='{style}'/>" if style else ""
    return f"<w:p><w:pPr>{styled}{named}</w:pPr><w:r><w:t>{text}</w:t></w:r></w:p>"


def test_paragraphs_of_a_word_document_have_the_numbers_that_it_shows() -> None:
    body = "".join(
        [
            _item("Scope", style="Clause"),
            _item("of work", 1, 1),
            _item("of time", 1, 1),
            _item("between"),
            _item("Term", style="Sub"),
            _item("deeper", 1, 1),
            _item("starts at seven", 5),
            _item("none", 0, style="Clause"),
            *(_item("条款", 2) for _ in range(12)),
            _item("dot", 3),
            _item("long", 4),
        ]
    )
    lines = text_of(docx(body, {"numbering": NUMBERING, "styles": STYLES}), types.DOCX).split("\n")
    shown = [line for line in lines if line]
    assert shown[:8] == [
        "1. Scope",
        "1.a) of work",
        "1.b) of time",
        "between",
        "2. Term",
        "2.a) deeper",
        "7. starts at seven",
        "none",
    ]
    assert [shown[n] for n in (8, 10, 17, 18, 19)] == [f"第{n}条 条款" for n in ("一", "三", "十", "十一", "十二")]
    assert shown[20:] == ["- dot", "1. long"]


def test_the_values_of_a_chart_in_a_word_document_are_a_table() -> None:
    def points(name: str, *values: str) -> str:
        cache = "".join(f"<c:pt idx='{n}'><c:v>{value}</c:v></c:pt>" for n, value in enumerate(values))
        cache = f"<c:formatCode>{'[$-409]mmm/yy' if name == 'cat' else '#,##0'}</c:formatCode>{cache}"
        return f"<c:{name}><c:cache>{cache}</c:cache></c:{name}>"

    def title(text: str) -> str:
        return f"<c:title><c:tx><c:rich><a:p><a:r><a:t>{text}</a:t></a:r></a:p></c:rich></c:tx></c:title>"

    series = f"<c:ser>{points('tx', 'Sold')}{points('cat', 'North', '46143')}{points('val', '12.5', '46143')}</c:ser>"
    axis = f"<c:valAx>{title('Thousands of pieces')}</c:valAx>"
    space = f"xmlns:c='{NAMES['a'].replace('/main', '/chart')}'"
    chart = f"<c:chart>{title('Pumps')}<c:plotArea>{series}{axis}</c:plotArea></c:chart>"
    part = f"<c:chartSpace {space}>{chart}</c:chartSpace>"
    shown = f"<w:p><w:r><w:drawing><c:chart {space} r:id='chart1' xmlns:r='{RELATIONS}'/></w:drawing></w:r></w:p>"
    body = f"{paragraph('before')}{shown * 2}{paragraph('after')}"
    text = text_of(docx(body, {"chart1": part}), types.DOCX)
    assert [line for line in text.split("\n") if line] == [
        "before",
        "Pumps",
        "Thousands of pieces",
        "|  | Sold |",
        "| --- | --- |",
        "| North | 12.5 |",
        "| 2026-05-01 | 46143 |",
        "after",
    ]


DIAGRAM = "".join(f"<a:p><a:r><a:t>{line}</a:t></a:r></a:p>" for line in ("Plan<a:br/>first", "Build")).replace(
    "<a:br/>", "</a:t></a:r><a:br/><a:r><a:t>"
)
SHOWN = "<dgm:relIds r:dm='{}' xmlns:dgm='http://schemas.openxmlformats.org/drawingml/2006/diagram' xmlns:r='{}'/>"


def test_the_words_of_a_diagram_in_a_word_document_stand_at_its_place() -> None:
    shown = f"<w:p><w:r><w:drawing>{SHOWN.format('diagram1', RELATIONS)}</w:drawing></w:r></w:p>"
    text = text_of(docx(f"{paragraph('before')}{shown * 2}{paragraph('after')}", {"diagram1": DIAGRAM}), types.DOCX)
    assert text.split() == ["before", "Plan", "first", "Build", "after"]


def test_a_sheet_keeps_the_words_of_its_diagrams() -> None:
    out = io.BytesIO(files.xlsx("Plan", [["step", "days"]]))
    with zipfile.ZipFile(out, "a") as book:
        for of, id_, kind, target in (
            ("worksheets/_rels/sheet1.xml", "d", "drawing", "../drawings/drawing1.xml"),
            ("drawings/_rels/drawing1.xml", "e", "diagramData", "../diagrams/data1.xml"),
        ):
            relation = f"<Relationship Id='{id_}' Type='{RELATIONS}/{kind}' Target='{target}'/>"
            book.writestr(f"xl/{of}.rels", f"<Relationships>{relation}</Relationships>")
        book.writestr("xl/drawings/drawing1.xml", f"<a>{SHOWN.format('e', RELATIONS)}</a>")
        book.writestr("xl/diagrams/data1.xml", f"<diagram {DECLARED}>{DIAGRAM}</diagram>")
    assert text_of(out.getvalue(), types.XLSX).split("\n")[-2:] == ["Plan first", "Build"]


@pytest.mark.parametrize(
    ("before", "section", "text"),
    [
        ("---\ntitle: 'Care: daily'\ntags:\n  - pump\n- valve\n\ndraft: true\n---\n", "Care: daily", "Rinse it."),
        ('+++\ntitle = "Care"\n[menu]\nweight = 3\n+++\n# Pump\n\n', "Pump", "Rinse it."),
        ("---\ndraft: true\n...\n", None, "Rinse it."),
        # Lines around a sentence or a list, and none that ends the properties.
        ("---\n- Open it.\n---\n", None, "---\n- Open it.\n---\nRinse it."),
        ("---\nOpen it.\n\n---\n", None, "---\nOpen it.\n\n---\nRinse it."),
        ("---\nnote: open it\n\n", None, "---\nnote: open it\n\nRinse it."),
    ],
    ids=["yaml", "toml", "other end", "list", "rule", "no end"],
)
def test_properties_before_a_markdown_text_are_not_a_part_of_it(before: str, section: str | None, text: str) -> None:
    [passage] = [line for line in parse(f"{before}Rinse it.".encode(), types.MARKDOWN) if "text" in line]
    assert (passage["section"], passage["text"]) == (section, text)


def test_an_e_mail_without_a_body_is_its_subject_and_people() -> None:
    mail = b"From: ann@example.com\nSubject: The delivery comes on Friday\nContent-Type: image/png\n\nx"
    [passage, end] = parse(mail, types.MAIL)[1:]
    assert (passage["section"], passage["text"]) == ("The delivery comes on Friday", "From: ann@example.com")
    assert end["warnings"] == ["Attachments are not read: image/png. Upload them as documents."]


def test_the_description_of_a_picture_is_apart_from_the_words_beside_it() -> None:
    page = "<p>Turn<img alt='the red valve'>to the <b>le<img alt=''>ft</b></p>"
    assert text_of(page.encode(), types.HTML) == "Turn the red valve to the left"


def test_styles_of_a_word_document_that_are_headings_by_their_level_or_base_give_the_section() -> None:
    def style(name: str, properties: str = "", base: str = "") -> str:
        based = f"<w:basedOn w:val='{base}'/>" if base else ""
        return (
            f"<w:style w:type='paragraph' w:styleId='{name}'><w:name w:val='{name}'/>{based}<w:pPr>{properties}</w:pPr>"
            "</w:style>"
        )

    styles = (
        style("heading 1", "<w:outlineLvl w:val='0'/>")
        + style("Chapter", base="heading 1")
        + style("TOC Heading", "<w:outlineLvl w:val='9'/>", "heading 1")
        + style("Clause", "<w:outlineLvl w:val='1'/>")
        + style("Loop", base="Loop")
    )
    body = "".join(
        _item(text, style=name)
        for text, name in (
            ("Contents", "TOC Heading"),
            ("Care", "Chapter"),
            ("Descaling", "Clause"),
            ("Do it.", "Loop"),
        )
    )
    lines = parse(docx(body, {"styles": styles}), types.DOCX)
    assert [(line["section"], line["text"]) for line in lines if "text" in line] == [
        (None, "Contents"),
        ("Care > Descaling", "Do it."),
    ]


def test_paragraphs_of_code_of_a_word_document_are_one_block_with_its_indents() -> None:
    """A comment in the code is not a heading."""
    style = "<w:style w:type='paragraph' w:styleId='C'><w:name w:val='Source Code'/></w:style>"
    lines = ("# ifconfig -a", "eth0", "    inet 10.0.0.1")
    code = "".join(
        f"<w:p><w:pPr><w:pStyle w:val='C'/></w:pPr><w:r><w:t xml:space='preserve'>{line}</w:t></w:r></w:p>"
        for line in lines
    )
    body = f"{_item('Run:', style='N')}{code}{_item('Read it.', style='N')}"
    [passage, _] = parse(docx(body, {"styles": style}), types.DOCX)[1:]
    assert passage["text"] == "Run:\n\n```\n# ifconfig -a\neth0\n    inet 10.0.0.1\n```\n\nRead it."


def pdf(content: str, page: str = "", catalog: str = "", objects: tuple[str, ...] = ()) -> bytes:
    """One page with this content. `objects` have the numbers from 6."""
    return files.assembled(
        [
            f"<< /Type /Catalog /Pages 2 0 R {catalog} >>",
            "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 4 0 R "
            f"/Resources << /Font << /F1 5 0 R >> >> {page} >>",
            f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
            "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
            *objects,
        ]
    )


def shown(x: int, y: int, text: str) -> str:
    return f"BT /F1 12 Tf {x} {y} Td ({text}) Tj ET\n"


def pages(*contents: str) -> bytes:
    """A PDF with one page for each content."""
    font = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>"
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(len(contents)))
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(contents)} >>", font]
    for content in contents:
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents {len(objects) + 2} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>",
            f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
        ]
    return files.assembled(objects)


def page_with(header: str, lines: str, footer: str) -> str:
    """The content of a page. Between its lines stand slashes."""
    text = "".join(shown(50, 720 - 15 * n, line) for n, line in enumerate(filter(None, lines.split("/"))))
    return shown(50, 770, header) + shown(300, 30, footer) + text


def test_headers_and_footers_do_not_stand_between_the_pages_of_a_pdf() -> None:
    """Left and right pages have their own. The header of a table is repeated too, but stands above its rows."""
    headers = ("Norrland guide", "Care of pumps")
    texts = ("The warranty lasts", "thirty months for/Part Stock/Gasket 7", "Part Stock/Valve 9/and all", "pumps.")
    content = pages(
        *(page_with(headers[n % 2], text, f"Page {n + 1} of 6") for n, text in enumerate(texts)),
        page_with(headers[0], "", "Page 5 of 6"),
        page_with(headers[1], "The end of guide", "Page 6 of 6"),
    )
    *lines, end = parse(content, types.PDF)
    assert [(line["text"], line["page"]) for line in lines[1:]] == [
        ("The warranty lasts", 1),
        ("The warranty lasts\nthirty months for\nPart Stock\nGasket 7", 2),
        ("Gasket 7\nPart Stock\nValve 9\nand all", 3),
        ("and all\npumps.", 4),
        ("The end of guide", 6),
        # Once, because the words stand nowhere else.
        ("Norrland guide", 1),
        ("Care of pumps", 2),
    ]
    assert end["pages_without_text"] == [5]


def test_lines_at_the_edges_of_pages_that_differ_are_text() -> None:
    """Numbers other than the page's, and the same line elsewhere on the page."""
    first, second = page_with("Invoice 1001", "Ada/owes", "Total 7"), page_with("Invoice 1002", "Ben/owes", "Total 8")
    text = text_of(pages(first, second), types.PDF)
    assert all(line in text for line in ("Invoice 1001", "Invoice 1002", "Total 7", "Total 8"))
    high = page_with("Civil law", "Ada", "").replace("50 770", "50 785")
    assert text_of(pages(page_with("Civil law", "Ben", ""), high), types.PDF).count("Civil law") == 2


def test_cells_of_a_table_in_a_pdf_stay_apart_and_on_their_line() -> None:
    rows = [("Part", "Price", "Stock"), ("Pump", "12", "4"), ("Valve", "7", "0")]
    content = "".join(
        shown(50 + 150 * column, 700 - 15 * n, cell) for n, row in enumerate(rows) for column, cell in enumerate(row)
    )
    assert text_of(pdf(content), types.PDF) == "Part Price Stock\nPump 12 4\nValve 7 0"


def test_words_that_a_line_of_a_pdf_breaks_are_whole() -> None:
    content = "".join(
        shown(50, 700 - 15 * n, line) for n, line in enumerate(("The main-", "tenance of the Baden-", "Baden pump."))
    )
    assert text_of(pdf(content), types.PDF) == "The maintenance of the Baden-Baden pump."


def test_a_word_that_a_page_of_a_pdf_breaks_is_whole_on_that_page() -> None:
    texts = ("Read the in-", "structions. The Baden-", "Baden pump has a ventil\\255", "ator. It is of size 7-", "a.")
    content = pages(*(page_with("Guide", text, f"Page {n} of 6") for n, text in enumerate(texts, 1)))
    whole = [line["text"].rpartition("\n")[2] for line in parse(content, types.PDF) if line.get("page")]
    assert whole[:5] == [
        "Read the instructions.",
        "The Baden-",
        "Baden pump has a ventilator.",
        "It is of size 7-",
        "a.",
    ]


def test_raised_digits_of_a_pdf_are_no_part_of_the_number_or_word_before() -> None:
    def raised(text: str) -> str:
        return f"/F1 7 Tf 5 Ts ({text}) Tj /F1 12 Tf 0 Ts"

    text = f"(about 10) Tj {raised('-6')} ( m) Tj {raised('2')} ( of pump) Tj {raised('1')} ( in 2026) Tj"
    assert text_of(pdf(f"BT /F1 12 Tf 50 700 Td {text} ET"), types.PDF) == "about 10^-6 m2 of pump^1 in 2026"
    slanted = "BT /F1 12 Tf .7 .7 -.7 .7 50 100 Tm (102) Tj ET"
    assert text_of(pdf(slanted), types.PDF) == "102"


def test_rows_of_a_word_table_that_begin_further_right_keep_their_columns() -> None:
    def row(*cells: str, before: int = 0) -> str:
        shift = f"<w:trPr><w:gridBefore w:val='{before}'/></w:trPr>" if before else ""
        return f"<w:tr>{shift}{''.join(f'<w:tc>{paragraph(cell)}</w:tc>' for cell in cells)}</w:tr>"

    table = f"<w:tbl>{row('Part', 'Price', 'Stock')}{row('7', '0', before=1)}{row('4', before=2)}</w:tbl>"
    assert text_of(docx(table), types.DOCX).splitlines()[2:] == ["|  | 7 | 0 |", "|  |  | 4 |"]


def test_the_fields_and_comments_of_a_pdf_are_read() -> None:
    kinds = (
        "/Subtype /Widget /FT /Tx /T (n) /TU (Your name) /V <FEFF4FDD4FEE>",
        "/Subtype /Widget /FT /Btn /T (agree) /V /Yes /AS /Yes",
        "/Subtype /Widget /FT /Btn /T (refuse) /V /Off /AS /Off",
        "/Subtype /Text /Contents (a sticky note)",
        "/Subtype /Link /Contents (a link)",
    )
    fields = tuple(f"<< /Type /Annot {kind} /Rect [100 600 200 620] /F 4 /P 3 0 R >>" for kind in kinds)
    numbers = " ".join(f"{n} 0 R" for n in range(6, 6 + len(kinds)))
    content = pdf(shown(50, 700, "A form"), f"/Annots [{numbers}]", f"/AcroForm << /Fields [{numbers}] >>", fields)
    assert text_of(content, types.PDF) == "A form\nYour name: 保修\nagree: ☑\na sticky note"


def test_letters_that_are_one_sign_of_an_arabic_pdf_keep_their_order(tmp_path: Path) -> None:
    import typst

    source = tmp_path / "a.typ"
    source.write_text('#set text(lang: "ar", dir: rtl)\nبدأ الاجتماع ولا يبدأ الإثنين')
    assert text_of(bytes(typst.compile(source)), types.PDF) == "بدأ الاجتماع ولا يبدأ الإثنين"
    assert text_of("\ufedf\ufe8e \ufefb".encode(), types.TEXT) == "لا لا"


def test_ligatures_and_letters_of_equations_are_read_as_plain_letters(tmp_path: Path) -> None:
    import typst

    source = tmp_path / "a.typ"
    source.write_text("An efficient office: $E = m c^2$")
    assert text_of(bytes(typst.compile(source)), types.PDF).startswith("An efficient office: E = mc")
    assert text_of("e\ufb03cient main\u00adtenance 𝐸".encode(), types.TEXT) == "efficient maintenance E"
    # Accents beside their letters, radicals in place of characters, letters of half the width.
    assert text_of("Cafe\u0301 \u2f64\u4e8e\u2f00\u822c ﾎﾟﾝﾌﾟ".encode(), types.TEXT) == "Café 用于一般 ポンプ"
    assert text_of("错误Ｅ０４，ＮＬ２－２３０！".encode(), types.TEXT) == "错误E04，NL2-230！"


def test_a_sheet_keeps_units_codes_durations_comments_and_text_boxes() -> None:
    from openpyxl import Workbook  # type: ignore[import-untyped]
    from openpyxl.chart import BarChart, Reference  # type: ignore[import-untyped]
    from openpyxl.comments import Comment  # type: ignore[import-untyped]

    book = Workbook()
    sheet = book.active
    rows: list[tuple[Any, str, str]] = [
        ("what", "", "what"),
        (1234.5, '#,##0.00 "€"', "1234.5 €"),
        (1234.5, '_("$"* #,##0.00_)', "$1234.5"),
        (-5, "[$¥-804]#,##0.00;[Red]-[$¥-804]#,##0.00", "-¥5"),
        (-6, "0.00;[Red]0.00", "-6"),
        (-7, '"Gain "0;"Loss "0', "Loss 7"),
        (-8, '"+"0;"-"0;0', "-8"),
        (-9, "00000", "-00009"),
        (12, 'General" pieces"', "12 pieces"),
        (0, '0;-0;"sold out"', "sold out (0)"),
        (0, '_($* #,##0_);_($* (#,##0);_($* "-"??_)', "$0"),
        (1, '"open";"open";"paid"', "open (1)"),
        (13, ";;;", "13"),
        (12, '0\\ "kg"', "12 kg"),
        (7, "00000", "00007"),
        (0.125, "0.0%", "12.5%"),
        (0.25, "0.0%;(0.0%)", "25%"),
        (0.375, "0.0%_)", "37.5%"),
        (5, "0.00\\%", "5%"),
        (1500000, '0.0,,"M"', "1.5M"),
        (2500000, '#,##0,"k"', "2500k"),
        (3500, '[>=1000000]0.0,,"M";[>=1000]0.0,"k";0', "3.5k"),
        (4500, '#\\ ##0\\ "€"', "4500 €"),
        (20260504, '0000"-"00"-"00', "2026-05-04"),
        (9912345678, "(000) 000-0000", "(991) 234-5678"),
        (6543.5, '#0"x"00.0', "6543.5"),
        (dt.timedelta(hours=30, minutes=5), "[h]:mm:ss", "30:05:00"),
        (True, "", "TRUE"),
        ("two_x000D_\nlines", "", "two lines"),
        ("#DIV/0!", "", "#DIV/0!"),
    ]
    for n, (value, format_, _) in enumerate(rows, 1):
        cell = sheet.cell(n, 1, value)
        if format_:
            cell.number_format = format_
    sheet["A1"].comment = Comment("in euros", "Ann")
    chart = BarChart()
    chart.title = "Costs of 2026"
    chart.add_data(Reference(sheet, min_col=1, min_row=2, max_row=3))
    sheet.add_chart(chart, "D1")
    secret = book.create_sheet("Rates")
    secret.append(["rate", "=1+1"])
    secret.sheet_state = "hidden"
    out = io.BytesIO()
    book.save(out)
    lines = parse(out.getvalue(), types.XLSX)
    text = "\n".join(line["text"] for line in lines if "text" in line)
    for _, _, seen in rows:
        assert f"| {seen} |" in text
    assert "A1: in euros" in text
    assert "Costs of 2026" in text
    assert lines[-1]["warnings"] == [
        "The sheet Rates is hidden, and was read.",
        "Formulas of the sheet Rates have no stored values, so they are empty: open and save the file.",
    ]


STRICT = {
    types.DOCX: docx(f"{paragraph('Rinse the pump.')}<w:p><w:r>{NEW_BOX}</w:r></w:p>"),
    types.XLSX: files.xlsx("Codes", [["code", "since"], ["E04", dt.date(2026, 5, 4)]]),
    types.PPTX: files.pptx([("Care", "Rinse the pump.")]),
}


@pytest.mark.parametrize(("type_", "content"), STRICT.items(), ids=["docx", "xlsx", "pptx"])
def test_an_office_file_of_the_strict_form_has_the_same_text(type_: str, content: bytes) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as usual, zipfile.ZipFile(out, "w") as strict:
        for name in usual.namelist():
            names = rb"http://schemas.openxmlformats.org/(?!package)(\w+)/2006/"
            strict.writestr(name, re.sub(names, rb"http://purl.oclc.org/ooxml/\1/", usual.read(name)))
    assert text_of(out.getvalue(), type_) == text_of(content, type_) != ""


def test_a_link_to_another_workbook_may_be_broken() -> None:
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(files.xlsx("Codes", [["code"], ["E04"]]))) as given,
        zipfile.ZipFile(out, "w") as book,
    ):
        for name in given.namelist():
            part = given.read(name)
            if name == "xl/workbook.xml":
                link = f"<externalReferences><externalReference xmlns:r='{RELATIONS}' r:id='x'/></externalReferences>"
                part = part.replace(b"<calcPr", f"{link}<calcPr".encode())
            if name == "xl/_rels/workbook.xml.rels":
                kind = f"{RELATIONS}/externalLink"
                link = f"<Relationship Id='x' Type='{kind}' Target='externalLinks/externalLink1.xml'/>"
                part = part.replace(b"</Relationships>", f"{link}</Relationships>".encode())
            book.writestr(name, part)
        space = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
        book.writestr("xl/externalLinks/externalLink1.xml", f"<externalLink xmlns='{space}'/>")
    assert text_of(out.getvalue(), types.XLSX) == "| code |\n| --- |\n| E04 |"


def test_slides_with_drawn_lines_are_read_and_those_with_only_a_number_have_no_text() -> None:
    from lxml import etree  # type: ignore[import-untyped]
    from pptx import Presentation

    deck = Presentation(io.BytesIO(files.pptx([("Care", "Rinse the pump."), ("", ""), ("", "")])))
    for slide in deck.slides:
        # The date, the footer and the number.
        for holder, text in zip(list(slide.slide_layout.placeholders)[2:], ("4 May", "House rules", "7"), strict=True):
            slide.shapes.clone_placeholder(holder)
            slide.shapes[-1].text_frame.text = text
    tree = deck.slides[0].shapes._spTree
    etree.SubElement(tree, "{http://schemas.openxmlformats.org/presentationml/2006/main}contentPart")
    out = io.BytesIO()
    deck.save(out)
    lines = parse(out.getvalue(), types.PPTX)
    texts = [line["text"].split("\n\n") for line in lines if "text" in line]
    assert texts == [["Rinse the pump.", "4 May", "House rules"]]
    assert lines[-1]["pages_without_text"] == [2, 3]


def test_a_slide_keeps_its_chart_merged_cells_diagrams_and_descriptions() -> None:
    from pptx import Presentation
    from pptx.chart.data import CategoryChartData
    from pptx.enum.chart import XL_CHART_TYPE
    from pptx.util import Inches

    book = Presentation()
    slide = book.slides.add_slide(book.slide_layouts[6])
    values = CategoryChartData()  # type: ignore[no-untyped-call]
    values.categories = ["North", "South"]
    values.add_series("Sold", (12.5, None))  # type: ignore[no-untyped-call]
    size = (Inches(1), Inches(1), Inches(3), Inches(2))
    chart = slide.shapes.add_chart(XL_CHART_TYPE.COLUMN_CLUSTERED, *size, values).chart
    chart.has_title = True
    chart.chart_title.text_frame.text = "Pumps"
    table = slide.shapes.add_table(3, 2, *size).table
    for n, text in enumerate(("Place", "Month", "Oslo", "May", "", "June")):
        table.cell(n // 2, n % 2).text = text
    table.cell(1, 0).merge(table.cell(2, 0))
    picture = io.BytesIO(PIXEL)
    slide.shapes.add_picture(picture, 0, 0)._element.nvPicPr.cNvPr.set("descr", "A red pump")
    out = io.BytesIO()
    book.save(out)
    text = text_of(out.getvalue(), types.PPTX)
    assert text.startswith("Pumps\n\n|  | Sold |\n| --- | --- |\n| North | 12.5 |\n| South |  |")
    assert "| Oslo | May |\n| Oslo | June |" in text
    assert text.endswith("A red pump")


def test_a_slide_keeps_charts_in_three_dimensions_and_boxes_with_equations() -> None:
    from lxml import etree
    from pptx import Presentation
    from pptx.chart.data import CategoryChartData
    from pptx.enum.chart import XL_CHART_TYPE
    from pptx.util import Inches

    book = Presentation()
    slide = book.slides.add_slide(book.slide_layouts[6])
    values = CategoryChartData()  # type: ignore[no-untyped-call]
    values.categories = ["North", "South"]
    values.add_series("Sold", (12.5, 0.1 + 0.2))  # type: ignore[no-untyped-call]
    size = (Inches(1), Inches(1), Inches(3), Inches(2))
    for kind, flat in (XL_CHART_TYPE.COLUMN_CLUSTERED, "bar"), (XL_CHART_TYPE.PIE, "pie"):
        chart = slide.shapes.add_chart(kind, *size, values).chart
        for plot in chart._chartSpace.iter(f"{{*}}{flat}Chart"):
            plot.tag = plot.tag.replace(f"{flat}Chart", f"{flat}3DChart")
    runs = slide.shapes.add_textbox(*size).text_frame.paragraphs[0]
    marked = ("10", 0), ("-6", 30_000), (" m", 0), ("2", 30_000), (" H", 0), ("2", -25_000), (" pump", 0), ("1", 30_000)
    for text, baseline in marked:
        run = runs.add_run()
        run.text = text
        run.font._element.set("baseline", str(baseline))
    box = slide.shapes.add_textbox(*size)
    box.text_frame.text = "Energy: "
    m14 = "http://schemas.microsoft.com/office/drawing/2010/main"
    equation = etree.fromstring(
        f"<a:m xmlns:a='{m14}' xmlns:m='{NAMES['m']}'><m:oMath><m:r><m:t>E=mc</m:t></m:r><m:sup><m:r><m:t>2</m:t>"
        "</m:r></m:sup></m:oMath></a:m>"
    )
    box.text_frame.paragraphs[0]._p.append(equation)
    tree = box._element.getparent()
    both = etree.SubElement(tree, f"{{{NAMES['mc']}}}AlternateContent")
    etree.SubElement(both, f"{{{NAMES['mc']}}}Choice", Requires="a14").append(box._element)
    out = io.BytesIO()
    book.save(out)
    table = "|  | Sold |\n| --- | --- |\n| North | 12.5 |\n| South | 0.3 |"
    text = text_of(out.getvalue(), types.PPTX)
    assert text.count(table) == 2
    assert text.endswith("10^-6 m2 H2 pump^1\n\nEnergy: E=mc^2")


PAGES = {
    "header after a table in a cell": (
        "<table><tr><th>k</th></tr><tr><td>a<table><tr><td>n</td></tr></table></td></tr><tr><td>b</td></tr></table>",
        "| k |\n| --- |\n| n |\n| --- |\n\n| k |\n| --- |\n| a |\n| b |",
    ),
    "numbers of a list": (
        "<ol start=3><li>three<ul><li>dot</ul><li>four<li value=9>nine</ol>",
        "3. three\n- dot\n4. four\n9. nine",
    ),
    "letters of a list": (
        "<ol type=a><li>one<li>two<ol type=I><li>three<li>four</ol></ol>",
        "a. one\nb. two\nI. three\nII. four",
    ),
    "form": (
        "<input type=checkbox checked> yes <input type=radio> no <input value=42> <input type=hidden value=7>",
        "☑ yes ☐ no 42",
    ),
    "heading in a cell": (
        "<table><tr><th>Code<th>Meaning</tr><tr><td><h4>E04</h4><td>no water</tr><tr><td>E05<td>hot</tr></table>",
        "| Code | Meaning |\n| --- | --- |\n| E04 | no water |\n| E05 | hot |",
    ),
    "code in a cell": (
        "<table><tr><th>Do<th>Reset</tr><tr><td><pre>run\n  b</pre><td><pre>off</pre></tr><tr><td>x<td>y</tr></table>",
        "| Do | Reset |\n| --- | --- |\n\n```\nrun\n  b\n```\n| Do | Reset |\n| --- | --- |\n|  | off |\n| x | y |",
    ),
    "code in code": ("<pre>a\n<div><pre>b\nc</pre></div>d</pre>e", "```\na\nb\nc\nd\n```\ne"),
    "heading in two lines": ("<h2>Care<br>of pumps</h2>x<br>y", "x\ny"),
    "pronunciation": ("<p><ruby>東<rp>(</rp><rt>とう</rt><rp>)</rp>京<rt>きょう</rt></ruby></p>", "東京"),
    "title beside a heading": ("<title>Care - A shop</title><h1>Care</h1><p>x</p>", "x"),
    "chosen and written": (
        "<select><option>a<option selected>b</select> <textarea>Call us.</textarea>",
        "b Call us.",
    ),
    "signs of code in code": ("<pre>a\n```py\nb</pre><h2>H</h2>c", "````\na\n```py\nb\n````\nc"),
    "power": ("<p>5 &times; 10<sup>6</sup> m<sup>2</sup>, the 1<sup>st</sup></p>", "5 × 10^6 m2, the 1st"),
    "mark": ("<p>The pump<sup><a href='#n'>1</a></sup> and CO<sup>2</sup></p>", "The pump^1 and CO2"),
    "deleted text": ("<p>costs <del>30</del><ins>45</ins> euros</p>", "costs 45 euros"),
}


@pytest.mark.parametrize(("page", "text"), PAGES.values(), ids=PAGES)
def test_a_page_is_read_as_it_is_shown(page: str, text: str) -> None:
    assert text_of(page.encode(), types.HTML) == text


TEXT = "The machine is cleaned each week, and its filter is changed each month. " * 3
# The parts, and the text that is left of them.
NAVIGATION = {
    "menu": (
        "<nav><h3>Help</h3><ul><li><a href=/a>Start</a><li><a href=/b>Terms</a></ul><button>Close</button></nav>",
        "",
    ),
    "path": ("<ol id=breadcrumbs><li><a href=/a>Home</a> » <li><a href=/b>Machines</a></ol>", ""),
    "hours in a menu": (
        "<nav><a href=/b>Visit us</a> Monday to Friday, 9 to 17</nav>",
        "Visit us Monday to Friday, 9 to 17",
    ),
    "telephone in a menu": ("<nav><a href=/b>Shop</a> <a href='tel:5550100'>555 0100</a></nav>", "Shop 555 0100"),
    "dishes": (
        "<ul class=menu><li><a href=/a>Soup 4.50</a><li><a href=/b>Fish 9.00</a></ul>",
        "- Soup 4.50\n- Fish 9.00",
    ),
    "links of an article": ("<article class=nav><a href=/a>Wiring plan</a></article>", "Wiring plan"),
    "headings": ("<ul><li><a href='#c'>1.2 Care</a></ul><h2 id=c>1.2 Care <a href='#c'>¶</a></h2>One.", "One."),
    "names of tabs": (
        "<ul><li><a href='#w'>Windows</a></ul><div id=w role=tabpanel hidden>Run it.</div>",
        "- Windows\nRun it.",
    ),
    "found by search": ("<p hidden=until-found>Valid for a year.</p><p hidden>secret</p>", "Valid for a year."),
    "first link": ("<a class=skipToContent_1x href='#main'>Skip to main content</a>", ""),
    "cookies": ("<div id=cookie-banner>We use cookies.<button>Accept</button></div><p class=cookie>Bake.</p>", "Bake."),
    "numbers of lines": (
        "<table><tr><td class=linenos><pre>1\n2</pre><td><pre>run\nstop</pre></table>"
        "<pre><span class=lineno>1 </span>go</pre><p class=gutter>A gutter.</p>",
        "```\nrun\nstop\n```\n\n```\ngo\n```\n\nA gutter.",
    ),
}


@pytest.mark.parametrize(("part", "left"), NAVIGATION.values(), ids=NAVIGATION)
def test_a_page_is_read_without_its_navigation(part: str, left: str) -> None:
    text = text_of(f"<body>{part}<p>{TEXT}</p></body>".encode(), types.HTML)
    assert text == f"{left}\n\n{TEXT.strip()}".strip()


def test_the_section_of_a_page_has_no_links_of_its_heading() -> None:
    page = b"<h2>Care<span class=mw-editsection>[<a href=/e>edit</a>]</span> <a href='#care'>\xc2\xb6</a></h2>One."
    [passage, _] = parse(page, types.HTML)[1:]
    assert passage["section"] == "Care"


def test_a_page_that_is_a_list_of_links_is_read() -> None:
    assert text_of(b"<h1>Forms</h1><nav><a href=/a>Travel</a> <a href=/b>Leave</a></nav>", types.HTML) == "Travel Leave"


def test_the_title_of_a_page_without_a_heading_is_its_section() -> None:
    [passage, _] = parse(b"<title>Care\n of pumps</title><h2>Daily</h2><p>Clean it.</p>", types.HTML)[1:]
    assert passage["section"] == "Care of pumps > Daily"


def test_underlined_headings_of_markdown_give_the_section() -> None:
    text = b"Care\n====\n\nClean it.\n\nPump\n----\nWeekly.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n- item\n---\n"
    sections = [(line["section"], line["text"]) for line in parse(text, types.MARKDOWN) if "text" in line]
    assert [section for section, _ in sections] == ["Care", "Care > Pump"]
    assert sections[0][1] == "Clean it."
    assert "| a | b |\n|---|---|\n| 1 | 2 |" in sections[1][1]


def test_a_sign_of_a_heading_that_is_part_of_a_word_stays() -> None:
    lines = parse(b"# C#\na\n## F# ###\nb\n", types.MARKDOWN)
    assert [line["section"] for line in lines if "text" in line] == ["C#", "C# > F#"]


def test_a_table_that_states_its_delimiter_is_read_by_it() -> None:
    assert text_of(b"sep=;\r\na;b,c\r\n1;2,5\r\n", types.CSV) == "| a | b,c |\n| --- | --- |\n| 1 | 2,5 |"


@pytest.mark.parametrize(
    ("table", "row"),
    [
        ("1,50;2,70\n3,20;4,10\n", "| 1,50 | 2,70 |"),
        ("1,50\t2,70\n3,20\t4,10\n", "| 1,50 | 2,70 |"),
        ("Name;Price, net\nA;1,50\nB;2,70\n", "| Name | Price, net |"),
        ("id,tags\n1,a;b\n2,c;d\n", "| id | tags |"),
        ('name, note\nAnn, "hello, world"\n', "| Ann | hello, world |"),
        ("one column\n" * 60 + "a,b\n", "| a | b |"),
    ],
)
def test_commas_of_decimal_numbers_do_not_cut_a_table(table: str, row: str) -> None:
    assert row in text_of(table.encode(), types.CSV).split("\n")


def test_the_status_of_a_delivery_is_part_of_an_e_mail() -> None:
    mail = (
        b"Subject: x\nContent-Type: multipart/report; boundary=b\n\n--b\nContent-Type: text/plain\n\nBounced.\n--b\n"
        b"Content-Type: message/delivery-status\n\nReporting-MTA: dns; x\n\nFinal-Recipient: rfc822; lost@x\n--b--\n"
    )
    assert "Final-Recipient: rfc822; lost@x" in text_of(mail, types.MAIL)
