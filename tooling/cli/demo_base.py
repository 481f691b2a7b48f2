"""The parts that both demos share: titles, lines, checks, and waiting. The first check that fails ends a demo."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import ClassVar, TypeVar

from rich.console import Console

from tooling.stack.engines.base import EngineError
from tooling.stack.home import Home

T = TypeVar("T")

# On a loaded machine, steps of a few seconds take minutes.
DEADLINE_SECONDS = 300.0
SAY_SECONDS = 30.0


class DemoBase:
    """Reads the address of the running system, and prints to `console`."""

    LABEL_WIDTH: ClassVar[int]

    def __init__(self, home: Home, console: Console) -> None:
        access = home.credentials()
        self._base_url: str = access["base_url"]
        self._admin_token: str = access["admin_token"]
        self._console = console

    async def _wait_for(self, thing: str, ask: Callable[[], Awaitable[T | None]]) -> T:
        """Asks until the answer is true, and returns it. Raises EngineError after DEADLINE_SECONDS."""
        began = time.monotonic()
        say = SAY_SECONDS
        while not (answer := await ask()):
            waited = time.monotonic() - began
            if waited > DEADLINE_SECONDS:
                raise EngineError(f"the demo failed: {thing} did not appear within {DEADLINE_SECONDS:.0f} s")
            if waited > say:
                self._line("", f"after {waited:.0f} s still waiting for {thing}")
                say += SAY_SECONDS
            await asyncio.sleep(0.05)
        return answer

    def _require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise EngineError(f"the demo failed: {problem}")

    def _title(self, number: int, text: str) -> None:
        self._console.print(f"\n[bold]{number}  {text}[/]")

    def _line(self, label: str, text: str) -> None:
        self._console.print(f"   {label:<{self.LABEL_WIDTH}} {text}", soft_wrap=True)
