"""`claw check`: all checks of the source that need no engine, the quickest first."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import typer

from tooling.cli import contracts, words
from tooling.cli.committed import ROOT, committed_files
from tooling.cli.grpc_stubs import ProtoError
from tooling.cli.output import Json

# Not searched in tests: their passwords are invented, and their stack generates its own.
_IN_URL = "a password in a URL"
# Patterns of text that must not be committed. They find careless cases, not deliberately hidden ones.
_FORBIDDEN = {
    "a private key": re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
    "a vendor's token": re.compile(
        r"\b(?:sk-[A-Za-z0-9_-]{20,}|xox[abp]-[A-Za-z0-9-]{10,}|gh[pos]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}"
        r"|AIza[0-9A-Za-z_-]{35}|\d{8,10}:AA[A-Za-z0-9_-]{33})"
    ),
    _IN_URL: re.compile(r"\b[a-z][a-z0-9+]*://[^\s/:@{}<>\"'$…]+:[^\s/:@{}<>\"'$…]{3,}@"),
    "an index address": re.compile(
        r"(?:--(?:extra-)?index-url|--trusted[-]host|index-url\s*=)|/simple/?(?:\s|\"|$)|\"resolved\":\s*\"https?:"
    ),
    "a machine's path": re.compile(r"(?<![\w.}/-])/(?:home|Users|root|work|workspace)/[\w.-]+"),
}
# Example values that are not secrets, such as amqp://user:password@host.
_PLACEHOLDERS = re.compile(r"://(?:user|name|guest)[^:]*:(?:password|pw|secret|guest)@")


class Result(msgspec.Struct, frozen=True):
    """The result of one check."""

    check: str
    ok: bool
    seconds: float
    output: str = ""
    """The problems, as the tool prints them; empty if the check is ok."""


def check(json: Json = False) -> None:
    """Check format, lint, secrets, words, layers, contracts and types."""
    results = []
    for name, run in _checks().items():
        typer.echo(f"{name} … ", nl=False, err=json)
        began = time.monotonic()
        output = run()
        result = Result(name, not output, round(time.monotonic() - began, 1), output)
        typer.echo(f"{'ok' if result.ok else 'FAILED'} ({result.seconds} s)", err=json)
        if not result.ok:
            typer.echo(result.output, err=True)
        results.append(result)
    failed = [result.check for result in results if not result.ok]
    if json:
        rows = [{"check": row.check, "ok": row.ok, "seconds": row.seconds} for row in results]
        typer.echo(msgspec.json.encode(rows))
    else:
        typer.echo(f"failed: {', '.join(failed)}" if failed else f"all {len(results)} checks are ok")
    if failed:
        raise typer.Exit(1)


def _checks() -> dict[str, Callable[[], str]]:
    return {
        "format": lambda: _tool("ruff", "format", "--check", "."),
        "lint": lambda: _tool("ruff", "check", "."),
        "no secrets": lambda: "\n".join(unwanted(committed_files(ROOT))),
        "plain words": lambda: "\n".join(words.stumbles(committed_files(ROOT))),
        "layers": lambda: _tool("lint-imports"),
        "generated code": _generated_code,
        "compatibility": _compatibility,
        "types": lambda: _tool("mypy"),
    }


def _tool(name: str, *arguments: str) -> str:
    """Runs a tool of this environment. Returns its output if it fails, otherwise an empty text."""
    command = [str(Path(sys.executable).with_name(name)), *arguments]
    result = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", check=False
    )
    return "" if result.returncode == 0 else result.stdout or f"{name} ended with {result.returncode}"


def _generated_code() -> str:
    try:
        return "\n".join(contracts.outdated(ROOT, contracts.generate(ROOT)))
    except ProtoError as error:
        return str(error)


def _compatibility() -> str:
    try:
        generated = contracts.generate(ROOT)
    except ProtoError as error:
        return str(error)
    return "\n".join(contracts.broken(contracts.committed(ROOT), generated) + contracts.bad_examples(ROOT))


def unwanted(texts: dict[str, str]) -> list[str]:
    """``path:line: looks like …`` for each line that matches a forbidden pattern. Does not show the value."""
    return [
        f"{path}:{number}: looks like {what}"
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        for what, pattern in _FORBIDDEN.items()
        if pattern.search(_PLACEHOLDERS.sub("", line))
        if not (what == _IN_URL and path.startswith("tests/"))
    ]
