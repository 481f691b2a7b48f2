"""``./claw replay``: rebuilds a projection, compares it with the live one, and replaces the live one."""

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
    projection: Annotated[str, typer.Argument(help="<service>.<handler>, for example agent.count_runs.")],
    from_events: Annotated[
        str, typer.Option(help="Rebuild from this service's event store. The consumer waits until the end.")
    ] = "",
    switch: Annotated[bool, typer.Option(help="Use the rebuilt tables even if they differ.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Rebuild a projection in shadow tables, and switch to them if they are equal. Exit code 1 if not switched."""
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
        out.print(f"Switched after {rebuilt.records} records. The old tables are in schema {service}_retired.")
    else:
        out.print(f"The live tables stay. Schema {service}_rebuild has those rebuilt from {rebuilt.records} records.")
        out.print("If the topic was wiped, it may lack records: rebuild with --from-events SERVICE.")
        out.print("To use the rebuilt tables although they differ: --switch.")


def load(name: str) -> Service:
    """The declaration of a service. `name`: a service, or the path of its package. Raises NotFound."""
    path = name if "." in name else f"services.{name}"
    try:
        service = importlib.import_module(f"{path}.__main__").service
    except ModuleNotFoundError as error:
        raise NotFound(f"service {name}: {error}") from error
    assert isinstance(service, Service)
    return service


def find(projection: str) -> tuple[Service, Subscription]:
    """The service and the subscription of a projection. Raises NotFound if the service has no such handler."""
    name, _, handler = projection.rpartition(".")
    if not name:
        raise NotFound(f"projection {projection!r}: must have the form <service>.<handler>")
    service = load(name)
    for subscription in service.subscriptions:
        if subscription.name.endswith(f".{handler}"):
            # A replay has no side effects and therefore no adapters: a handler that uses one fails at once.
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
    """Rebuilds from Kafka, or from the event store of `from_events`. Writes an audit record for a switch."""
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
