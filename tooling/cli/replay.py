"""``./claw replay``: rebuilds a read model, compares it with the live one, and replaces the rows that differ.

There are two kinds. A projection is filled by a handler of Kafka's messages: it is rebuilt in shadow tables, which
replace the live ones. A read model that its service writes in the transaction of its source is compared with that
source, batch by batch; a switch repairs the rows that differ.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import asdict, replace
from functools import partial
from typing import Annotated

import typer
from rich.console import Console

from infra.errors import NotFound
from infra.security.audit import audit
from infra.service import verification
from infra.service.replay import Progress as ReplayProgress
from infra.service.replay import Replay, ReplayResult
from infra.service.service import Service
from protos.catalog import SERVICES
from protos.topology import Subscription
from tooling.cli import read_models
from tooling.cli.output import Json, Progress, print_json, printable
from tooling.stack import operator

out = Console(highlight=False)


def replay(
    name: Annotated[str, typer.Argument(help="For example agent.runs; --list shows all.")] = "",
    list_all: Annotated[bool, typer.Option("--list", help="List the read models of all services.")] = False,
    from_events: Annotated[
        str,
        typer.Option(help="Rebuild a projection from this service's event store. The consumer waits until the end."),
    ] = "",
    switch: Annotated[bool, typer.Option(help="Repair the rows that differ; use rebuilt tables that differ.")] = False,
    restart: Annotated[
        bool, typer.Option(help="Start again from the beginning after an interrupted verification.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Rebuild a read model and compare it with the live one, while the services run.

    Exit code 1 if they differ and the live one stays. Ctrl-C pauses; the same command continues.
    """
    access = operator.engines_access()
    if list_all:
        read_models.show(operator.run(read_models.find_all(access, map(load, SERVICES))), as_json=as_json)
        return
    service, _, own_name = _split(name)
    if work := read_models.verification_of(access, service, own_name, switch=switch, restart=restart):
        read_models.verify(access, f"{service.name}.{own_name}", work, switch=switch, as_json=as_json)
        return
    _rebuild(access, name, from_events, switch=switch, restart=restart, as_json=as_json)


def _rebuild(
    access: dict[str, dict[str, str]],
    projection: str,
    from_events: str,
    *,
    switch: bool,
    restart: bool,
    as_json: bool,
) -> None:
    service, subscription = find(projection)
    owner = load(from_events) if from_events else None
    try:
        with Progress() as progress:
            progress.show(f"rebuild {projection}")
            rebuilt = operator.run(
                rebuild(
                    access["postgres"]["url"],
                    access["kafka"]["bootstrap_servers"],
                    service.name,
                    subscription,
                    partial(progress.count, f"records of {projection}"),
                    from_events=owner,
                    switch=switch,
                    restart=restart,
                )
            )
    except KeyboardInterrupt:
        out.print("Interrupted. The same command goes on; with --from-events it begins again.", soft_wrap=True)
        raise typer.Exit(130) from None
    if as_json:
        print_json(asdict(rebuilt))
    else:
        _tell(service.name, rebuilt)
    if not rebuilt.switched:
        raise typer.Exit(1)


def _tell(service: str, rebuilt: ReplayResult) -> None:
    for table in rebuilt.tables:
        verdict = "[green]equal[/]" if table.equal else "[red]different[/]"
        out.print(f"{table.table}: {verdict}, live {table.live_rows} rows, rebuilt {table.rebuilt_rows}")
        for key in table.differences:
            out.print(f"  {printable(key)}", markup=False)
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
        if error.name not in (path, f"{path}.__main__"):
            raise
        raise NotFound(f"service {name}: does not exist; must be one of {', '.join(SERVICES)}") from error
    assert isinstance(service, Service)
    return service


def _split(name: str) -> tuple[Service, str, str]:
    """The service of a read model, the service's name or path, and the read model's own name."""
    path, _, own_name = name.rpartition(".")
    if not path:
        shown = f"read model {name!r}: must" if name else "NAME: must"
        raise NotFound(f"{shown} have the form <service>.<name>, such as agent.runs; --list shows all")
    return load(path), path, own_name


def find(projection: str) -> tuple[Service, Subscription]:
    """The service and the subscription of a projection. Raises NotFound if the service has no such projection."""
    service, name, handler = _split(projection)
    for subscription in service.subscriptions:
        if subscription.projection and subscription.name.endswith(f".{handler}"):
            # A replay has no side effects and therefore no adapters: a handler that uses one fails at once.
            nothing = dict.fromkeys(service.adapters[subscription.name])
            return service, replace(subscription, handler=partial(subscription.handler, **nothing))
    known = ", ".join(f"{name}.{model.name}" for model in read_models.declared([service]))
    raise NotFound(
        f"{name} has no read model {handler!r}; it has {known or 'none'}. --list shows those of all services"
    )


async def rebuild(
    url: str,
    bootstrap: str,
    service: str,
    subscription: Subscription,
    progress: ReplayProgress,
    *,
    from_events: Service | None = None,
    switch: bool = False,
    restart: bool = False,
) -> ReplayResult:
    """Rebuilds from Kafka, or from the event store of `from_events`. Writes an audit record for a switch."""
    async with operator.database(url, service) as database:
        rebuild = Replay(database.engine, service, subscription, progress)
        if from_events is not None:
            rebuilt = await rebuild.from_events(from_events.name, from_events.aggregates, switch_unequal=switch)
        else:
            prefix = os.environ.get("CLAW_TOPIC_PREFIX", "")
            rebuilt = await rebuild.from_kafka(bootstrap, prefix=prefix, switch_unequal=switch, restart=restart)
        async with database.engine.begin() as connection:
            unequal = 0 if rebuilt.switched else sum(not table.equal for table in rebuilt.tables)
            rows = sum(table.live_rows for table in rebuilt.tables)
            await verification.store(connection, subscription.name.rpartition(".")[2], rows, unequal)
        if rebuilt.switched:
            async with database.begin() as tx:
                different = ",".join(table.table for table in rebuilt.tables if not table.equal)
                audit(tx, operator.actor(), "projection.switch", "projection", subscription.name, different=different)
    return rebuilt
