"""`claw map`: the producers and consumers of each topic and queue, from the catalog and from the code; and the calls.

A consumer is a service whose ``__main__`` subscribes to the topic or queue. A producer is a service whose code names
the topic or queue outside of decorators. Every service produces to the topics and queues that the kernel names.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import textwrap
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import msgspec
import typer

import infra
import services
from protos.calls import METHODS, ROUTES
from protos.catalog import CATALOG
from protos.topology import Catalog, Queue, Topic
from tooling.cli.output import Json

_FOR = {"tenant": "a tenant", "operator": "the operator", "either": "a tenant or the operator"}


class Party(msgspec.Struct, frozen=True):
    """A service that sends to or receives from a topic or queue."""

    service: str
    state: Literal["code", "declared", "undeclared"]
    """code: in catalog and code; declared: in the catalog only; undeclared: in the code only."""

    def __str__(self) -> str:
        return self.service + {"code": "", "declared": "*", "undeclared": "!"}[self.state]


class Flow(msgspec.Struct, frozen=True):
    """A topic or queue with its producers and consumers."""

    name: str
    kind: Literal["topic", "queue"]
    about: str
    producers: list[Party]
    consumers: list[Party]


def map(
    json: Json = False,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="Print a Mermaid flow chart.")] = False,
) -> None:
    """Show the producers and consumers of each topic and queue, and which service may call which method."""
    found = flows(CATALOG, existing_services())
    if json:
        typer.echo(msgspec.json.encode(found))
    else:
        typer.echo(as_mermaid(found) if mermaid else f"{as_text(found)}\n\n{calls_as_text()}")


def existing_services() -> dict[str, str]:
    """Service → its package, for each folder in `services` that has a ``__main__``."""
    folders = [Path(folder) for folder in services.__path__]
    mains = sorted(path for folder in folders for path in folder.glob("*/__main__.py"))
    return {path.parent.name: f"services.{path.parent.name}" for path in mains}


def flows(catalog: Catalog, packages: Mapping[str, str]) -> list[Flow]:
    """Every topic and queue of `catalog` with its producers and consumers. `packages`: service → its package."""
    consumed = {name: subscribed(package) for name, package in packages.items()}
    kernel = named(infra)
    produced = {name: named(importlib.import_module(package)) | kernel for name, package in packages.items()}
    result = []
    sources: list[Topic | Queue] = [*catalog.topics, *catalog.queues]
    for source in sources:
        consumers = source.consumers if isinstance(source, Topic) else (source.consumer,)
        # A consumer may name its source outside of a decorator, such as in a loop over several queues.
        senders = [
            name
            for name in packages
            if source.name in produced[name] - (set() if name in source.producers else consumed[name])
        ]
        result.append(
            Flow(
                source.name,
                "topic" if isinstance(source, Topic) else "queue",
                _about(source),
                _parties(source.producers, senders),
                _parties(consumers, [name for name in consumed if source.name in consumed[name]]),
            )
        )
    return result


def subscribed(package: str) -> set[str]:
    """The names of the topics and queues that the service's ``__main__`` subscribes to."""
    service = importlib.import_module(f"{package}.__main__").service
    return {subscription.source.name for subscription in service.subscriptions}


def named(package: ModuleType) -> set[str]:
    """The names of the topics and queues whose constants the code of `package` uses outside of decorators."""
    found: set[str] = set()
    for module in _modules(package):
        tree = ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8"))
        decorators = {
            name
            for node in ast.walk(tree)
            for decorator in getattr(node, "decorator_list", ())
            for name in ast.walk(decorator)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node not in decorators:
                value = vars(module).get(node.id)
                for source in value.values() if isinstance(value, dict) else (value,):
                    if isinstance(source, Topic | Queue):
                        found.add(source.name)
    return found


def _modules(package: ModuleType) -> Iterator[ModuleType]:
    yield package
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if module.name.endswith(".migrations"):
            continue
        imported = importlib.import_module(module.name)
        if module.ispkg:
            yield from _modules(imported)
        else:
            yield imported


def _parties(declared: Collection[str], coded: Collection[str]) -> list[Party]:
    return [
        *(Party(name, "code" if name in coded else "declared") for name in declared),
        *(Party(name, "undeclared") for name in coded if name not in declared),
    ]


def _about(source: Topic | Queue) -> str:
    if isinstance(source, Topic):
        return f"{source.partitions} partitions, {source.retention.days} d, key {source.key}"
    delays = ", ".join(f"{delay.total_seconds():g} s" for delay in source.retries)
    return f"{source.exchange.name} {source.exchange.kind}, retries {delays}"


def as_text(found: list[Flow]) -> str:
    """The map as text of 80 columns."""
    lines = []
    for title, kind in (("Kafka topics", "topic"), ("RabbitMQ queues", "queue")):
        lines.append(title)
        for flow in (flow for flow in found if flow.kind == kind):
            lines.append(f"  {flow.name}  ({flow.about})")
            for label, parties in (("from", flow.producers), ("to", flow.consumers)):
                text = ", ".join(str(party) for party in parties)
                lines += textwrap.wrap(text, 80, initial_indent=f"    {label:<5}", subsequent_indent=" " * 9)
        lines.append("")
    return "\n".join([*lines, "* in the catalog, but not in the code", "! in the code, but not in the catalog"])


def calls_as_text() -> str:
    """The calls between services as text of 80 columns."""
    lines = ["gRPC methods: who may call them, and for whom"]
    for method, call in METHODS.items():
        lines.append(f"  {method.removeprefix('clawbus.')}")
        lines.append(f"    from {', '.join(call.callers)} for {_FOR[call.behalf]}")
    lines += ["", "HTTP routes: who may act on them for a client of a tenant, with which scope"]
    for route in ROUTES:
        lines.append(f"  {route.method} {route.path}")
        lines.append(f"    from {route.caller} to {route.callee}, {route.scope}")
    return "\n".join(lines)


def as_mermaid(found: list[Flow]) -> str:
    """A flow chart. A dotted arrow is in the catalog, but not in the code."""
    lines = ["flowchart LR"]
    for flow in found:
        node = flow.name.replace(".", "_")
        lines.append(f'  {node}[("{flow.name}")]' if flow.kind == "topic" else f'  {node}[["{flow.name}"]]')
        for party in flow.producers:
            lines.append(f"  {party.service} {'-.->' if party.state == 'declared' else '-->'} {node}")
        for party in flow.consumers:
            lines.append(f"  {node} {'-.->' if party.state == 'declared' else '-->'} {party.service}")
    return "\n".join(lines)
