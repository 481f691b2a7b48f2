"""``./claw replay``: builds a projection anew, compares it with the live one, puts it in its place."""

from __future__ import annotations

import importlib
import os
from dataclasses import asdict, replace
from functools import partial
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import Progress

from infra.errors import NotFound
from infra.security.audit import audit
from infra.service.replay import Progress as ReplayProgress
from infra.service.replay import Rebuilt, Replay
from infra.service.service import Service
from protos.topology import Subscription
from tooling.stack import operator

out = Console(highlight=False)


def replay(
    projection: Annotated[str, typer.Argument(help="<service>.<handler>, such as agent.count_runs.")],
    from_events: Annotated[
        str, typer.Option(help="Rebuild from this service's event store; the consumer waits meanwhile.")
    ] = "",
    switch: Annotated[bool, typer.Option(help="Take the rebuilt tables although they differ.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Rebuild a projection in shadow tables, compare, and switch when they are equal. Exit code 1 if they stay."""
    access = operator.engines_access()
    service, subscription = find(projection)
    owner = load(from_events) if from_events else None
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(projection, total=None)
        rebuilt = operator.run(
            rebuild(
                access["postgres"]["url"],
                access["kafka"]["bootstrap_servers"],
                service.name,
                subscription,
                lambda done, total: progress.update(task, completed=done, total=total),
                from_events=owner,
                switch=switch,
            )
        )
    if as_json:
        print(msgspec.json.encode(asdict(rebuilt)).decode())  # noqa: T201
    else:
        _tell(service.name, rebuilt)
    if not rebuilt.switched:
        raise typer.Exit(1)


def _tell(service: str, rebuilt: Rebuilt) -> None:
    for table in rebuilt.tables:
        verdict = "[green]equal[/]" if table.equal else "[red]different[/]"
        out.print(f"{table.table}: {verdict}, live {table.live_rows} rows, rebuilt {table.rebuilt_rows}")
    if rebuilt.switched:
        out.print(f"Switched, after {rebuilt.records} records. The old tables: schema {service}_retired.")
    else:
        out.print(f"The live tables stay. Those rebuilt from {rebuilt.records} records: schema {service}_rebuild.")
        out.print("A log that was wiped and sent again is not whole: then --from-events. To take them: --switch.")


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
    if not name:
        raise NotFound(f"projection {projection!r}: name it as <service>.<handler>")
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
    from_events: Service | None = None,
    switch: bool = False,
) -> Rebuilt:
    """Rebuilds from Kafka, or from the event store of `from_events`. A switch is audited."""
    async with operator.database(url, service) as database:
        rebuild = Replay(database.engine, service, subscription, progress)
        if from_events is not None:
            rebuilt = await rebuild.from_events(from_events.name, from_events.aggregates, switch_unequal=switch)
        else:
            prefix = os.environ.get("CLAW_TOPIC_PREFIX", "")
            rebuilt = await rebuild.from_kafka(bootstrap, prefix=prefix, switch_unequal=switch)
        if rebuilt.switched:
            async with database.begin() as tx:
                different = ",".join(table.table for table in rebuilt.tables if not table.equal)
                audit(tx, operator.actor(), "projection.switch", "projection", subscription.name, different=different)
    return rebuilt
