"""The options and functions with which commands print their results, for people and for programs."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from types import TracebackType
from typing import Annotated, Any, Self

import msgspec
import typer
from rich.console import Console
from rich.text import Text

_SECONDS_OF_A_LINE = 10.0
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def printable(text: str) -> str:
    """`text` on one line. Control characters are escaped, because text from outside could steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_json(value: Any) -> None:
    """Prints one JSON document in ASCII: other control characters than those that JSON escapes could steer the terminal
    too."""
    print(json.dumps(msgspec.to_builtins(value, str_keys=True)))  # noqa: T201


class Progress:
    """How far a command is, on stderr, within a `with` block: one live line on a terminal; elsewhere, as under cron and
    in CI, a line every 10 s."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._live = self._console.status("") if self._console.is_terminal else None
        self._text = ""
        self._sizes: defaultdict[str, int] = defaultdict(int)
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._lines = threading.Thread(target=self._print_lines, daemon=True)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        else:
            self._lines.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live:
            self._live.stop()
        else:
            self._ended.set()
            self._lines.join()

    def show(self, text: str) -> None:
        """From now on, the command does this."""
        self._text = text
        if self._live:
            self._live.update(self._line())

    def count(self, unit: str, done: int, total: int) -> None:
        """`done` of `total` are done; `unit` is their name."""
        self.show(f"{done:,} of {total:,} {unit}")

    def add(self, part: str, size: int) -> None:
        """`size` more bytes of a part are read or written."""
        self._sizes[part] += size
        self.show(f"{part}: {self._sizes[part] / 1e6:,.1f} MB")

    def _print_lines(self) -> None:
        while not self._ended.wait(_SECONDS_OF_A_LINE):
            if self._text:
                self._console.print(self._line(), soft_wrap=True)

    def _line(self) -> Text:
        return Text(f"after {time.monotonic() - self._began:.0f} s: {printable(self._text)}")
