"""``./claw demo``: starts the stack, and has a message on a chat channel answered, delivered and billed."""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import Annotated, Any

import typer
from rich.console import Console

from tooling.cli.demo_billing import BillingDemo
from tooling.cli.demo_steps import Demo, Model
from tooling.cli.up import up
from tooling.stack.engines.base import EngineError
from tooling.stack.home import Home, home_folder
from tooling.stack.operator import run

SCRIPTED = Model("scripted/answer", None)
# The demo uses the first provider whose API key is in the environment.
_PROVIDERS = (
    ("OPENAI_API_KEY", "OPENAI_BASE_URL", "openai/gpt-4o-mini", "https://api.openai.com/v1"),
    ("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "anthropic/claude-haiku-4-5", "https://api.anthropic.com"),
)


def demo(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document. The steps go to standard error.")
    ] = False,
    billing: Annotated[
        bool, typer.Option("--billing", help="Invoice a synthetic month of three tenants in place of a message.")
    ] = False,
) -> None:
    """Start the stack. Send a message, show its answer, delivery, charge and trace, and then send it again."""
    began = time.monotonic()
    console = Console(stderr=as_json, highlight=False)
    if billing:
        _demo_billing(console, as_json=as_json)
        return
    model = choose_model(os.environ)
    console.print(
        "[bold]Clawbus demo[/]: a message on a chat channel is answered, delivered and billed.\n"
        "All engines and services are real.\n"
        "  vendor: a [yellow]local stand-in for Telegram[/], which checks each call that it gets\n"
        + (
            "  model:  [yellow]scripted/answer[/], a local stand-in that quotes the handbook by rules"
            if model is SCRIPTED
            else f"  model:  [green]{model.name}[/], with the API key from your environment"
        )
    )
    up()
    try:
        result: dict[str, Any] = asyncio.run(Demo(Home(home_folder()), model, console, began).run())
    except asyncio.CancelledError:
        raise EngineError("the demo was interrupted. The stack still runs; ./claw down stops it") from None
    if as_json:
        print(json.dumps(result))  # noqa: T201


def _demo_billing(console: Console, *, as_json: bool) -> None:
    console.print(
        "[bold]Clawbus demo[/]: from usage to paid invoices.\n"
        "  usage:    [yellow]synthetic[/], made up by this command\n"
        "  payments: a [yellow]local stand-in for Stripe[/], which checks each call that it gets"
    )
    up()
    result = run(BillingDemo(Home(home_folder()), console).run())
    if as_json:
        print(json.dumps(result))  # noqa: T201


def choose_model(environment: Any) -> Model:
    """The model of the first provider whose API key is in the environment, else the scripted model.

    CLAW_DEMO_MODEL names another model of that provider.
    """
    for key, base, name, usual in _PROVIDERS:
        if environment.get(key):
            wanted = environment.get("CLAW_DEMO_MODEL") or name
            return Model(wanted, {"base_url": environment.get(base) or usual, "api_key": environment[key]})
    return SCRIPTED
