"""Renders Markdown, as models write it, in the dialects of vendors."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.parser_inline import ParserInline
from markdown_it.rules_block import StateBlock, table
from markdown_it.rules_inline import StateInline
from markdown_it.rules_inline.state_inline import Scanned
from markdown_it.token import Token

Pair = tuple[str, str]
_FENCE = re.compile("`{3,}")
_SCHEMES = ("http://", "https://", "mailto:", "tel:")
_BREAK = re.compile(r"<br ?/?>", re.IGNORECASE)
# After the scheme; marks around an address do not belong to it.
_ADDRESS = re.compile(r"://(?:[^\x00-\x20\"&*<>\[\\\]`{|}~\x7f-\U0010ffff]|&(?!amp;)|~(?!~))+")

# Formulas of LaTeX: their ends by their beginnings; and one between dollars, but not prices and variables.
_FORMULAS = {r"\(": r"\)", r"\[": r"\]", "$$": "$$"}
_SHORT_FORMULA = re.compile(r"\$(?![\s$])((?:(?!\*\*)[^$`\n])*)(?<!\s)\$(?!\d)")
_OF_FORMULAS = re.compile(r"[\\^_=]")
# A formula has at most so many characters, and lines.
_MAX_FORMULA, _MAX_FORMULA_LINES = 1_000, 100

# Of a code block. It is sent without escapes, so it must be no mention and no mark.
_LANGUAGE = re.compile(r"[\w+#.-]{1,40}")
# The parser adds the cells that rows of a table lack. With its own limit, 65,536, a text of 2 KB would take a second
# and 100 MB, and parsed texts are kept for a while. The package has a function of the module's name in its place.
_of_tables = vars(sys.modules["markdown_it.rules_block.table"])
_of_tables["MAX_AUTOCOMPLETED_CELLS"] = 1_000
_at_pipes: Callable[[str], list[str]] = _of_tables["escapedSplit"]
_CODE = re.compile(r"(?<![`\\])(`++)[^`]*+\1(?!`)")
# The signs of a text, outside of code, that a reader of Markdown would take for a mark or an escape; and addresses.
# An underscore within a word, and a star between spaces, are none.
_MARKS = re.compile(
    rf"https?{_ADDRESS.pattern}"
    r"|\\(?=[!-/:-@\[-`{-~])|`|(?<!\s)\*|\*(?!\s)|(?<![^\W_])_(?!\s)|(?<!\s)_(?![^\W_])|~(?=~)|(?<=~)~"
    r"|\[(?=[^\[\]]*\]\()|^\[(?=[^\[\]]*\]:)|^(?=[#>]|-#|[-+]\s|=+$)"
)


def _cells(line: str) -> list[str]:
    """The cells of a row of a table. A pipe in a code is a part of it, also without a backslash: models write it so."""
    return _at_pipes(_CODE.sub(lambda code: re.sub(r"(?<!\\)\|", r"\\|", code[0]), line))


_of_tables["escapedSplit"] = _cells


def unchanged(text: str) -> str:
    return text


def backslashed(text: str) -> str:
    """The text with a backslash before each of its signs that is a mark in Markdown."""
    return _MARKS.sub(lambda sign: sign[0] if sign[0].startswith("http") else f"\\{sign[0]}", text)


@dataclass(frozen=True)
class Dialect:
    """The marks of one dialect. A pair stands before and after its text."""

    bold: Pair
    italic: Pair
    strike: Pair
    code: Pair
    fence: Callable[[str, str], str]
    """Renders a code block from its escaped text and its language."""
    quote: Callable[[str], str]
    """Renders a quotation from its rendered text."""
    link: Callable[[str, str], str]
    """Renders a link from its rendered label and its URL."""
    escape: Callable[[str], str]
    """Escapes plain text so that no character of it is a mark or a mention."""
    literal: Callable[[str], str] = unchanged
    """Escapes marks in text that is not code, for vendors who read Markdown."""
    heading: Pair | None = None
    """None: as bold text."""
    image: Callable[[str, str], str] | None = None
    """Renders an image from its description and its URL. None: as a link."""
    bullet: str = "• "
    line: str = "\n"
    """A line break in a paragraph."""
    joint: str = ""
    """Stands between a span's mark and a letter outside of it, for vendors that see no mark next to a letter."""


def plain_link(label: str, url: str) -> str:
    """A link for dialects without links: the label and the URL in parentheses."""
    return url if label in (url, url.removeprefix("mailto:")) else f"{label} ({url})"


def quoted_lines(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))


def broken_quote(text: str) -> str:
    """A quotation whose line breaks are spaces at the ends of lines."""
    return "\n".join(f"> {line}" for line in text.split("\n"))


def fenced(text: str, language: str) -> str:
    """A code block for dialects without languages and without longer fences."""
    return f"```\n{unfenced(text)}\n```"


def unfenced(text: str) -> str:
    """The text with a zero-width space in each fence, which would otherwise end the block, or begin one."""
    return _FENCE.sub(lambda fence: "\u200b".join(fence[0]), text)


MARKDOWN = Dialect(
    bold=("**", "**"),
    italic=("*", "*"),
    strike=("~~", "~~"),
    code=("`", "`"),
    fence=lambda text, language: f"```{language}\n{unfenced(text)}\n```",
    quote=quoted_lines,
    link=lambda label, url: f"[{label}]({url})",
    escape=unchanged,
    literal=backslashed,
)
"""Of the vendors who read Markdown, apart from their own rules."""

PLAIN = Dialect(
    bold=("", ""),
    italic=("", ""),
    strike=("", ""),
    code=("", ""),
    fence=lambda text, language: text,
    quote=unchanged,
    link=plain_link,
    escape=unchanged,
)
"""Text without any marks."""


def render(text: str, dialect: Dialect) -> str:
    """`text` in the dialect. Blocks are separated as in the source; HTML in it is shown as text.

    A text of nothing but marks, such as an empty code block, is shown as it is: vendors refuse empty messages.
    """
    renderer = _Renderer(dialect)
    return renderer.blocks(list(_parse(text)), 0).strip("\n") or renderer.text(text)


@lru_cache(maxsize=64)
def _parse(text: str) -> tuple[Token, ...]:
    # Cached, because the same text is measured and then sent.
    return tuple(_parser().parse(text))


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "linkify": False}).enable("table")
    # The rule takes a line such as ``[Result]: 42`` out of the text. Links by reference stay text, as their definitions
    # do: after a cut, the two may stand in different messages.
    parser.disable("reference")
    parser.block.ruler.at("table", _whole_table, {"alt": ["paragraph", "reference"]})
    parser.block.ruler.before("list", "formula", _formula_block, {"alt": ["paragraph", "list"]})
    parser.inline = _Inline()
    return parser


def _whole_table(state: StateBlock, first: int, end: int, silent: bool) -> bool:
    """As the parser's rule, which drops the cells of a row that has more than the head: they stay in the last one."""
    before = len(state.tokens)
    if not table(state, first, end, silent):
        return False
    columns = 0
    for n, token in enumerate(state.tokens[before:], before):
        columns += token.type == "th_open"
        last = state.tokens[n - 2]
        if token.type == "tr_close" and last.map and (row := last.map[0]) > first:
            cells = _cells(_line(state, row).removeprefix("|").removesuffix("|"))
            if len(cells) > columns:
                last.content = " | ".join(cell.strip() for cell in cells[columns - 1 :])
    return True


def _formula_block(state: StateBlock, first: int, end: int, silent: bool) -> bool:
    """A formula of several lines is a paragraph. A ``-`` at the beginning of a line does not make a list of it."""
    lines = [_line(state, first)]
    closing = _FORMULAS.get(lines[0][:2])
    if state.is_code_block(first) or not closing or closing in lines[0][2:]:
        return False
    for n in range(first + 1, min(end, first + _MAX_FORMULA_LINES)):
        lines.append(_line(state, n))
        if lines[-1].endswith(closing):
            break
        if not lines[-1] or lines[-1][:2] in _FORMULAS or state.sCount[n] < state.blkIndent:
            return False
    else:
        return False
    if not silent:
        state.line = first + len(lines)
        state.push("paragraph_open", "p", 1)
        inline = state.push("inline", "", 0)
        inline.content, inline.children = "\n".join(lines), []
        state.push("paragraph_close", "p", -1)
    return True


def _line(state: StateBlock, n: int) -> str:
    return state.src[state.bMarks[n] + state.tShift[n] : state.eMarks[n]].strip()


class _State(StateInline):
    def scanDelims(self, start: int, canSplitWord: bool) -> Scanned:
        """Lets a mark between a wide letter and punctuation begin or end a span, as in ``他说**“好”**了``.

        CommonMark takes spaces for the ends of words; models write Chinese, Japanese and Korean without them, and
        the marks would be shown. So would those of ``**Note:**text``. A star between digits is a sign, as in ``2*3*4``.
        """
        can_open, can_close, length = super().scanDelims(start, canSplitWord)
        end = start + length
        before, after = self.src[start - 1 : start] or " ", self.src[end : min(end + 1, self.posMax)] or " "
        if canSplitWord and not before.isspace() and not after.isspace():
            can_open |= unicodedata.east_asian_width(before) in "WF"
            can_close |= unicodedata.east_asian_width(after) in "WF"
            if length == 2:
                can_open |= before.isalpha() and not after.isalnum()
                can_close |= after.isalpha() and not before.isalnum()
        if self.src[start] == "*" and before.isdecimal() and after.isdecimal():
            can_open = can_close = False
        return Scanned(can_open, can_close, length)


class _Inline(ParserInline):
    def __init__(self) -> None:
        super().__init__()
        self.ruler.before("escape", "formula", _formula)
        self.ruler.before("strikethrough", "address", _address)
        self.ruler.before("strikethrough", "break", _break)

    def parse(self, src: str, md: MarkdownIt, env: MutableMapping[str, Any], tokens: list[Token]) -> list[Token]:
        """As in the base class, with the state of this module."""
        state = _State(src, md, env, tokens)
        self.tokenize(state)
        for rule in self.ruler2.getRules(""):
            rule(state)
        return state.tokens


def _address(state: StateInline, silent: bool) -> bool:
    """A bare address is text: an underscore in it is not a mark."""
    found = _ADDRESS.match(state.src, state.pos, state.posMax)
    if not found or not state.src.endswith(("http", "https"), 0, state.pos):
        return False
    text = found[0].rstrip("_")
    state.pos += len(text)
    if not silent:
        state.append_pending(text)
    return True


def _formula(state: StateInline, silent: bool) -> bool:
    """A formula is text: a star and an underscore in it are signs, as in ``\\hat{y}_{t} = \\hat{x}_{t}``."""
    opening = state.src[state.pos : state.pos + 2]
    if closing := _FORMULAS.get(opening):
        stop = state.src.find(closing, state.pos + 2, min(state.pos + _MAX_FORMULA, state.posMax))
        text = state.src[state.pos : stop + 2] if stop > 0 else ""
        content = text[2:-2]
    else:
        found = _SHORT_FORMULA.match(state.src, state.pos, state.posMax)
        text, content = (found[0], found[1]) if found else ("", "")
    if not text or (opening != r"\(" and not _OF_FORMULAS.search(content)):
        return False
    if not silent:
        # Of an escaped bracket, only the bracket is shown.
        shown = f"{text[1:-2]}{text[-1]}" if text[0] == "\\" else text
        for n, line in enumerate(shown.split("\n")):
            if n:
                state.push("softbreak", "br", 0)
            state.append_pending(line)
    state.pos += len(text)
    return True


def _break(state: StateInline, silent: bool) -> bool:
    """Models write ``<br>``, above all in tables, although other HTML is text."""
    found = _BREAK.match(state.src, state.pos, state.posMax)
    if not found:
        return False
    state.pos = found.end()
    if not silent:
        state.push("hardbreak", "br", 0)
    return True


class _Renderer:
    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect

    def blocks(self, tokens: Sequence[Token], depth: int) -> str:
        """Renders sibling blocks, with one empty line between two that have one in Markdown."""
        rendered: list[str] = []
        at = 0
        while at < len(tokens):
            token = tokens[at]
            end = _end(tokens, at)
            rendered.append(self._block(token, tokens[at + 1 : end], depth))
            at = end + 1
        return "\n\n".join(block for block in rendered if block)

    def _block(self, token: Token, inner: Sequence[Token], depth: int) -> str:
        dialect = self._dialect
        match token.type:
            case "paragraph_open":
                return self._inline(inner[0])
            case "heading_open":
                before, after = dialect.heading or dialect.bold
                text = self._inline(inner[0], within=frozenset(("strong",)) if dialect.heading is None else frozenset())
                return f"{before}{text}{after}" if text else ""
            case "fence" | "code_block" if not token.content.strip():
                return ""
            case "fence" | "code_block":
                language = _LANGUAGE.match(token.info.strip())
                return dialect.fence(dialect.escape(token.content.rstrip("\n")), language[0] if language else "")
            case "blockquote_open":
                return dialect.quote(self.blocks(inner, depth))
            case "bullet_list_open" | "ordered_list_open":
                return self._list(token, inner, depth)
            case "table_open":
                return dialect.fence(dialect.escape(_table(inner)), "")
            case "hr":
                return "———"
        return dialect.escape(token.content)

    def _list(self, token: Token, inner: Sequence[Token], depth: int) -> str:
        number = int(token.attrGet("start") or 1) if token.type == "ordered_list_open" else None
        tight = any(child.hidden for child in inner if child.type == "paragraph_open")
        items: list[str] = []
        at = 0
        while at < len(inner):
            end = _end(inner, at)
            text = self.blocks(inner[at + 1 : end], depth + 1)
            if tight:
                text = text.replace("\n\n", "\n")
            mark = self._dialect.bullet if number is None else f"{number}. "
            indent = "    "
            items.append(mark + text.replace("\n", f"\n{indent}"))
            number = None if number is None else number + 1
            at = end + 1
        return "\n".join(items)

    def _inline(self, token: Token, within: frozenset[str] = frozenset()) -> str:
        dialect = self._dialect
        # The rendered pieces of each open span, the outermost first; True: the piece stands between marks.
        stack: list[list[tuple[str, bool]]] = [[]]
        links: list[str] = []
        pairs = {"strong": dialect.bold, "em": dialect.italic, "s": dialect.strike}
        for child in token.children or ():
            kind = child.type.removesuffix("_open").removesuffix("_close")
            marked = False
            if child.type in ("softbreak", "hardbreak"):
                text = dialect.line
            elif child.type == "code_inline":
                before, after = dialect.code
                # No dialect with this mark can show it in a code.
                code = child.content.replace("`", "\u02cb") if before == "`" else child.content
                text, marked = f"{before}{dialect.escape(code)}{after}", True
            elif child.type == "image":
                # A link in the label of another one would tear it.
                url = "" if links else str(child.attrGet("src") or "")
                text = self._link(self.text(child.content), url, dialect.image or dialect.link)
            elif child.nesting == 1:
                stack.append([])
                if kind == "link":
                    links.append(str(child.attrGet("href") or ""))
                continue
            elif child.nesting == -1:
                text = self._joined(stack.pop())
                if kind == "link":
                    url = links.pop()
                    text = self._link(text, url, dialect.link) if text else ""
                elif kind in pairs and kind not in within and text:
                    before, after = pairs[kind]
                    text, marked = f"{before}{text}{after}", True
            else:
                text = self.text(child.content)
            stack[-1].append((text, marked))
        return self._joined(stack[0])

    def _joined(self, pieces: list[tuple[str, bool]]) -> str:
        joined = ""
        after_mark = False
        for text, marked in pieces:
            if (marked and joined[-1:].isalnum()) or (after_mark and text[:1].isalnum()):
                joined += self._dialect.joint
            joined += text
            after_mark = marked
        return joined

    def text(self, text: str) -> str:
        escaped = self._dialect.escape(self._dialect.literal(text))
        return unfenced(escaped) if self._dialect.code[0] == "`" else escaped

    def _link(self, label: str, url: str, rendered: Callable[[str, str], str]) -> str:
        """Only a link to a page, an address or a number. Others mean something to a vendor: tg://user notifies a
        person, and a path leads nowhere."""
        label = label.replace(self._dialect.line, " ")
        if not url.lower().startswith(_SCHEMES):
            return plain_link(label, self.text(url)) if url else label
        # Parentheses end the address in Markdown.
        return rendered(label, url.replace("(", "%28").replace(")", "%29"))


def _end(tokens: Sequence[Token], at: int) -> int:
    """The index of the token that closes the block at `at`; `at` itself if the block is a single token."""
    depth = 0
    for index in range(at, len(tokens)):
        depth += tokens[index].nesting
        if depth == 0:
            return index
    return len(tokens) - 1


def _table(tokens: Sequence[Token]) -> str:
    """A table with columns of equal width."""
    rows: list[list[str]] = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            rows[-1].append(_Renderer(PLAIN)._inline(token).replace("\n", " "))
    widths = [max(_width(row[n]) for row in rows if n < len(row)) for n in range(max(map(len, rows)))]
    lines = [
        "  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _width(text: str) -> int:
    """The columns that the text takes in a font of equal widths."""
    return sum(1 + (unicodedata.east_asian_width(sign) in "WF") for sign in text)
