"""``./claw demo``: a company's chat channel, from nothing to an answered, delivered and billed message."""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import Annotated, Any

import typer
from rich.console import Console

from tooling.cli.demo_steps import Model, Story
from tooling.cli.up import up
from tooling.stack.engines.base import EngineError
from tooling.stack.home import Home, home_folder

SCRIPTED = Model("scripted/answer", None)
# The first whose key is in the environment is used.
_PROVIDERS = (
    ("OPENAI_API_KEY", "OPENAI_BASE_URL", "openai/gpt-4o-mini", "https://api.openai.com/v1"),
    ("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "anthropic/claude-haiku-4-5", "https://api.anthropic.com"),
)


def demo(
    as_json: Annotated[bool, typer.Option("--json", help="For programs; what happens goes to standard error.")] = False,
) -> None:
    """Connect a channel, send a message, watch it answered, delivered, billed and traced; then send it again."""
    began = time.monotonic()
    console = Console(stderr=as_json, highlight=False)
    model = choose_model(os.environ)
    console.print(
        "[bold]Clawbus demo[/]: a message on a chat channel is answered, delivered and billed.\n"
        "Engines and services are the real ones. Two things stand in for others:\n"
        "  · the vendor is a [yellow]local stand-in for Telegram[/], which checks what it is sent\n"
        + (
            "  · the model is [yellow]scripted/answer[/]: rules that quote the handbook, no model"
            if model is SCRIPTED
            else f"  · nothing else: the model is [green]{model.name}[/], by the key in your environment"
        )
    )
    up()
    home = Home(home_folder())
    story = Story(home, model, console, began)
    try:
        result: dict[str, Any] = asyncio.run(story.tell())
    except asyncio.CancelledError:
        raise EngineError("the demo was ended; the stack still runs") from None
    if as_json:
        print(json.dumps(result))  # noqa: T201


def choose_model(environment: Any) -> Model:
    """The real model whose key is in the environment, else the scripted one. CLAW_DEMO_MODEL names another."""
    for key, base, name, usual in _PROVIDERS:
        if environment.get(key):
            wanted = environment.get("CLAW_DEMO_MODEL") or name
            return Model(wanted, {"base_url": environment.get(base) or usual, "api_key": environment[key]})
    return SCRIPTED
