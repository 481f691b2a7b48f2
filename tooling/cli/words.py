"""Phrases that are hard to read, and the search for them in every text of the repository.

A text is a comment, a docstring, any other string (a log message, an error, an output line), or a line of
Markdown, HTML, YAML, SQL or shell. In tests only comments and docstrings count: their strings are data.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

# Pattern → what to write instead.
PHRASES = {
    r"\b[Ww]here (?!to\b)": "'if' for a condition; name the place otherwise",
    r"\b[Ww]hat (?!to\b|happen)": "name the thing: 'the rows that …'",
    r"\b([Ww]ho|[Ww]hom|[Ww]hat|[Ww]hich)ever\b": "'each', 'any', or the name of the thing",
    r"\b[Nn]obody\b": "'no one', or better the name of the caller, process or user",
    r"\banew\b": "'again'",
    r"\bof (which|whom|whose)\b": "two sentences, or 'whose'",
    r"\b(is|are|was|were) none that\b": "'is not a …'",
    r"(?<![Tt]here )\b(is|are|was|were) no (?!longer|more|one\b)\w": "'is not a …'",
    r"\bfor ever\b": "'forever', or a duration",
    r"\bcomes again\b": "'is repeated', 'is delivered again'",
    r"\bset(s|ting)? aside\b": "'park' for a key, 'dead letter' for a message",
    r"\bincarnations?\b": "'topic id'",
    r"\bupkeep\b": "'maintenance'",
    r"\bhands too fast\b": "'lanes lost repeatedly'",
    r"\b(as|so) that it is no\b": "'not a …'",
    r"\b([Aa]ny|[Ss]ome)body\b": "'a user', 'another process', 'each caller'",
    r"\bafresh\b": "'again'",
    r"\bsigns? of life\b": "'heartbeat', 'response'",
    r"(?<![\w-])(she|hers?|herself|he|his|himself)\b": "'they', 'their', or the name of the thing",
    r"\bin place of which\b": "'instead'",
    r"\ball the same\b": "'nevertheless', or two sentences",
    r"\bhas it that\b": "name who says it",
    r"\blies? in a (file|folder|module) of its own\b": "'is in a separate …'",
    r"\bsuffices for\b": "'is enough for'",
    r"\bnought\b": "'zero'",
    r"\bwhilst\b": "'while'",
    r"\bthereby\b": "two sentences",
    r"\b(wherein|whereby|whence|hence)\b": "two sentences, or 'so'",
    r"\bin vain\b": "'without a result'",
    r"\bupon\b": "'on'",
    r"\blest\b": "'so that … not'",
}
_PATTERNS = {re.compile(pattern.replace(" ", r"\s")): advice for pattern, advice in PHRASES.items()}
_PLAIN_TEXT = (".md", ".html", ".yml", ".yaml", ".sql", ".sh", ".conf", ".toml")
# Data and generated text; applied migrations, which never change; the list itself.
_LEFT_OUT = re.compile(
    r"_pb2|^infra/postgres/kernel/\d{4}_|^protos/(asyncapi|ws-schema|schemas/)|^tooling/testing/handbook/|^tests/.*\.(json|html|md)$"
    r"|^tooling/cli/words\.py$|^requirements|^LICENSE|^NOTICE"
)


class Text(NamedTuple):
    """A piece of prose and the line on which it begins."""

    line: int
    text: str


def stumbles(texts: dict[str, str]) -> list[str]:
    """``path:line: the phrase: the advice`` for each phrase of the list in `texts` (path → content)."""
    found = []
    for path, content in texts.items():
        if _LEFT_OUT.search(path):
            continue
        if path.endswith(".py"):
            prose = python_texts(content, with_strings=not path.startswith("tests/"))
        elif path.endswith(_PLAIN_TEXT) or path == "claw":
            prose = (Text(number, line) for number, line in enumerate(content.splitlines(), 1))
        else:
            continue
        for text in prose:
            for pattern, advice in _PATTERNS.items():
                for match in pattern.finditer(text.text):
                    line = text.line + text.text.count("\n", 0, match.start())
                    around = " ".join(text.text[max(0, match.start() - 20) : match.end() + 30].split())
                    found.append(f"{path}:{line}: “{around}”: write {advice}")
    return found


def python_texts(source: str, *, with_strings: bool) -> Iterator[Text]:
    """Comments, those on successive lines together, and docstrings; with `with_strings` also strings of prose."""
    comments: list[Text] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, text = token.start[0], token.string.lstrip("#! ")
            if comments and line == comments[-1].line + comments[-1].text.count("\n") + 1:
                comments[-1] = Text(comments[-1].line, f"{comments[-1].text}\n{text}")
            else:
                comments.append(Text(line, text))
    yield from comments
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and (with_strings or id(node) in docstrings):
            yield Text(node.lineno, node.value)


if __name__ == "__main__":
    import sys

    from tooling.cli.committed import ROOT, committed_files

    chosen = {
        path: text for path, text in committed_files(ROOT).items() if path.startswith(tuple(sys.argv[1:] or ("",)))
    }
    sys.stdout.writelines(f"{line}\n" for line in stumbles(chosen))
