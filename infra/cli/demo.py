"""``./claw demo``: one message through HTTP, RabbitMQ, Kafka and gRPC, sent again, and with a kill half way."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

import asyncpg
import httpx
import typer
from rich.console import Console
from sqlalchemy.engine import make_url

from infra.cli.home import Home, home_folder
from infra.cli.up import up
from infra.engines import ENGINES
from infra.engines.base import EngineError, Place
from infra.schema import Passwords
from infra.testing.sample.run import Engines
from infra.testing.sample.story import DemoFailed, play

NEEDED = "postgres,kafka,rabbitmq,valkey"
CORNER = "claw_demo"
PREFIX = "demo."


def demo(
    as_json: Annotated[bool, typer.Option("--json", help="For programs; what happens goes to standard error.")] = False,
) -> None:
    """Send a message through the real engines, show its trace, repeat it, kill a service half way: one effect each."""
    console = Console(stderr=as_json, highlight=False)
    began = time.monotonic()
    console.print(
        "[bold]Clawbus demo[/]: one message through HTTP → RabbitMQ → Kafka → gRPC.\n"
        "The engines are the real ones; the services are the kernel's three samples,\n"
        "front, desk and ledger. How far the product's own services are, the status\n"
        "table in the README says.",
        soft_wrap=True,
    )
    up(only=NEEDED)
    place = Home(home_folder()).place()
    # PostgreSQL's roles are the whole server's, so their passwords are the stack's.
    passwords = Passwords(*(place.secret(f"postgres.sample.{role}") for role in ("owner", "request", "worker")))
    try:
        result = asyncio.run(_in_corner(place, passwords, console, began))
    except DemoFailed as error:
        raise EngineError(f"the demo failed: {error}\nThe services' logs: {place.home / 'demo'}") from error
    except asyncio.CancelledError:
        raise EngineError("the demo was ended; its services are stopped, the engines run") from None
    console.print(
        "\nThe samples are stopped; the engines still run. Next:\n"
        "  ./claw status     what runs         ./claw map       who sends what to whom\n"
        "  ./claw dlq list   what failed       ./claw logs      what the engines say\n"
        "  ./claw down       stop the engines"
    )
    if as_json:
        print(json.dumps(result))  # noqa: T201


async def _in_corner(place: Place, passwords: Passwords, console: Console, began: float) -> dict[str, Any]:
    engines = await prepare_corner({name: ENGINES[name].access(place) for name in NEEDED.split(",")}, CORNER)
    folder = place.folder("demo")
    for log in folder.glob("*.log"):
        log.unlink()
    return await play(engines, folder, passwords, PREFIX, console, began)


async def prepare_corner(access: dict[str, dict[str, Any]], name: str) -> Engines:
    """The samples' own database and virtual host, both called `name`, made if missing."""
    connection = await asyncpg.connect(access["postgres"]["url"])
    try:
        if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", name):
            await connection.execute(f"CREATE DATABASE {name}")
    finally:
        await connection.close()
    management = urlsplit(access["rabbitmq"]["management_url"])
    login = (management.username or "", management.password or "")
    address = f"http://{management.hostname}:{management.port}/api"
    async with httpx.AsyncClient(auth=login, trust_env=False) as client:
        (await client.put(f"{address}/vhosts/{name}")).raise_for_status()
        rights = {"configure": ".*", "write": ".*", "read": ".*"}
        (await client.put(f"{address}/permissions/{name}/{quote(login[0])}", json=rights)).raise_for_status()
    return Engines(
        make_url(access["postgres"]["url"]).set(database=name).render_as_string(hide_password=False),
        access["kafka"]["bootstrap_servers"],
        urlsplit(access["rabbitmq"]["url"])._replace(path=f"/{name}").geturl(),
        access["rabbitmq"]["management_url"],
        access["valkey"]["url"],
    )
