"""``./claw chat``: talk to an agent in the terminal."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import IO, Annotated, Any
from uuid import uuid4

import typer
from rich.console import Console

from tooling.cli.client import Gateway, gateway
from tooling.cli.output import print_json, printable
from tooling.cli.run import money
from tooling.stack import operator
from tooling.stack.engines.base import EngineError
from tooling.stack.home import Home, home_folder


def chat(
    agent: Annotated[str, typer.Option(help="The agent's id. Default: the demo's agent.")] = "",
    key: Annotated[str, typer.Option(envvar="CLAW_API_KEY", help="A tenant's API key. Default: the demo's.")] = "",
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON line for each answer: its run. The chat goes to stderr."),
    ] = False,
) -> None:
    """Talk to an agent. Ctrl-C cancels a running answer. Ctrl-C or Ctrl-D at the prompt ends the chat."""
    demo = Home(home_folder()).demo()
    agent, key = agent or demo.get("agent_id", ""), key or demo.get("api_key", "")
    if not agent or not key:
        raise EngineError("no agent to talk to: run ./claw demo first, or give --agent and --key")
    console = Console(stderr=as_json, highlight=False)
    try:
        asyncio.run(_talk(console, operator.access()["base_url"], key, agent, as_json=as_json))
    except KeyboardInterrupt:
        console.print()


async def _talk(console: Console, base_url: str, key: str, agent: str, *, as_json: bool) -> None:
    session = f"terminal-{uuid4().hex[:8]}"
    console.print("Type a message. Ctrl-C cancels an answer, Ctrl-D ends the chat.", style="dim")
    async with gateway(base_url, key) as api:
        while True:
            line = await _ask(console, "you    > ")
            if line is None:
                return
            if line.strip():
                run = await _answer(console, api, agent, session, line)
                if as_json and run:
                    print_json(run)


async def _ask(console: Console, prompt: str) -> str | None:
    """A line from the terminal; None at its end. A daemon thread reads it, so that Ctrl-C need not wait for input."""
    loop = asyncio.get_running_loop()
    line: asyncio.Future[str | None] = loop.create_future()

    def give(found: str | None) -> None:
        if not line.done():
            line.set_result(found)

    def read() -> None:
        try:
            found: str | None = input()
        except EOFError:
            found = None
        with suppress(RuntimeError):  # the loop is closed: the chat has ended
            loop.call_soon_threadsafe(give, found)

    console.print(prompt, end="", markup=False, soft_wrap=True)
    threading.Thread(target=read, daemon=True).start()
    return await line


async def _answer(console: Console, api: Gateway, agent: str, session: str, text: str) -> dict[str, Any] | None:
    """Shows one answer as it arrives. Asks the person for an approval if the run waits for one.

    Returns the run, or None if the person has cancelled it.
    """
    run_id = ""
    shown = _Shown(console.file)
    path = f"/api/v1/agents/{agent}/sessions/{session}/messages"
    try:
        async for event in api.events("POST", path, json={"text": text}):
            data = event.data
            run_id = data.get("run_id", run_id)
            match event.name:
                case "step.started" if data["kind"] == "tool":
                    console.print(f"         ⚙ {printable(data['name'])}", style="dim", markup=False)
                case "delta":
                    shown.delta(data)
                case "reply":
                    shown.reply(data["text"])
                case "run.waiting":
                    await _decide(console, api, run_id)
                case "run.indeterminate":
                    reason = f"{printable(data['error'])}. The run is indeterminate: an operator must resolve it"
                    console.print(f"\n{reason}", style="yellow", markup=False)
                    break
                case "run.failed" | "run.cancelled" | "run.refused":
                    console.print(f"\n{event.name}: {printable(data.get('error', ''))}", style="red", markup=False)
    except (KeyboardInterrupt, asyncio.CancelledError):
        if run_id:
            await api.post(f"/api/v1/runs/{run_id}/cancel")
        console.print("\ncancelled", style="red")
        return None
    run: dict[str, Any] = await api.get(f"/api/v1/runs/{run_id}")
    cost = "cost not yet known" if run["cost_nanos"] is None else money(run["cost_nanos"], run["currency"])
    console.print(f"\n         {cost} · ./claw run show {run_id}", style="dim")
    return run


async def _decide(console: Console, api: Gateway, run_id: str) -> None:
    """Asks whether the run may call its tool. Returns at once if the run waits for another agent."""
    waits = (await api.get(f"/api/v1/runs/{run_id}"))["waiting"]
    if not waits or waits["reason"] != "approval":
        return
    call = printable(f"{waits['tool']} {waits['arguments'] or ''}")
    answer = await _ask(console, f"\n         may the agent call {call}? [y/N] ")
    await api.post(f"/api/v1/runs/{run_id}/approval", {"approved": (answer or "").strip().lower() in ("y", "yes")})


class _Shown:
    """The part of an answer that is on the screen. If a later attempt or the reply differs, it is printed below."""

    def __init__(self, screen: IO[str]) -> None:
        self._screen = screen
        self._of: tuple[int, int] | None = None
        self._text = ""

    def delta(self, data: dict[str, Any]) -> None:
        of = data["step"], data["attempt"]
        if of != self._of:
            self._begin(of)
        self._write(data["text"])

    def reply(self, text: str) -> None:
        if not text.startswith(self._text) or self._of is None:
            self._begin(None)
        self._write(text.removeprefix(self._text))

    def _begin(self, of: tuple[int, int] | None) -> None:
        self._of, self._text = of, ""
        self._screen.write("\nagent  > ")

    def _write(self, text: str) -> None:
        self._text += text
        self._screen.write("\n".join(printable(line) for line in text.split("\n")))
        self._screen.flush()
