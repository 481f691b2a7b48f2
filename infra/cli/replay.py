"""``./claw replay``: builds a projection anew, compares it with the live one, puts it in its place."""

from __future__ import annotations

import asyncio
import importlib
from dataclasses import asdict, replace
from functools import partial
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import Progress

from infra.cli import operator
from infra.db import create_engine
from infra.errors import NotFound
from infra.eventstore.replay import Progress as ReplayProgress
from infra.eventstore.replay import Rebuilt, Replay
from infra.service import Service
from protos.topology import Subscription

out = Console(highlight=False)


def replay(
    projection: Annotated[str, typer.Argument(help="<service>.<handler>, see `claw map`.")],
    from_events: Annotated[
        str, typer.Option(help="Rebuild from this service's event store instead of from the topic.")
    ] = "",
    switch: Annotated[bool, typer.Option(help="Take the rebuilt tables although they differ.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Rebuild a projection in shadow tables, compare, and switch when they are equal."""
    access = operator.engines_access()
    service, subscription = find(projection)
    progress = Progress(console=Console(stderr=True), transient=True)
    with progress:
        task = progress.add_task(projection, total=None)
        rebuilt = asyncio.run(
            rebuild(
                access["postgres"]["url"],
                access["kafka"]["bootstrap_servers"],
                service.name,
                subscription,
                lambda done, total: progress.update(task, completed=done, total=total),
                from_events=load(from_events) if from_events else None,
                switch=switch,
            )
        )
    if json:
        print(msgspec.json.encode(asdict(rebuilt)).decode())  # noqa: T201
    else:
        for table in rebuilt.tables:
            verdict = "[green]equal[/]" if table.equal else "[red]different[/]"
            out.print(f"{table.table}: {verdict}, live {table.live_rows} rows, rebuilt {table.rebuilt_rows}")
        out.print(f"{rebuilt.records} records; " + ("switched" if rebuilt.switched else "the live tables stay"))
    if not rebuilt.switched:
        raise typer.Exit(1)


def load(name: str) -> Service:
    """The declaration of a service: ``services.<name>``, or a module path. Raises NotFound."""
    path = name if "." in name else f"services.{name}"
    try:
        service = importlib.import_module(f"{path}.__main__").service
    except ModuleNotFoundError as error:
        raise NotFound(f"service {name}: {error}") from error
    assert isinstance(service, Service)
    return service


def find(projection: str) -> tuple[Service, Subscription]:
    """Raises NotFound where the service has no such handler."""
    name, _, handler = projection.rpartition(".")
    service = load(name)
    for subscription in service.subscriptions:
        if subscription.name.endswith(f".{handler}"):
            # Adapters are for side effects, which are off: a handler that uses one in a replay fails at once.
            nothing = dict.fromkeys(service.adapters[subscription.name])
            return service, replace(subscription, handler=partial(subscription.handler, **nothing))
    raise NotFound(f"{name} has no handler {handler!r} ({', '.join(s.name for s in service.subscriptions)})")


async def rebuild(
    url: str,
    bootstrap: str,
    service: str,
    subscription: Subscription,
    progress: ReplayProgress,
    *,
    prefix: str = "",
    from_events: Service | None = None,
    switch: bool = False,
) -> Rebuilt:
    engine = create_engine(url, pool_size=4, name="replay", schema=service)
    try:
        rebuild = Replay(engine, service, subscription, progress)
        if from_events is not None:
            return await rebuild.from_events(from_events.name, from_events.aggregates, switch_unequal=switch)
        return await rebuild.from_kafka(bootstrap, prefix=prefix, switch_unequal=switch)
    finally:
        await engine.dispose()
