"""``./claw memory``: the index of the memory service."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Literal

import typer
from rich.console import Console

from infra.errors import NotFound
from services.memory.indexes.factory import make_index
from services.memory.indexes.migration import Migrated, build_again
from services.memory.indexes.migration import migrate as move
from services.memory.indexes.model_change import ModelState, states
from tooling.cli.output import Json, Progress, print_json, printable
from tooling.stack import operator

app = typer.Typer(no_args_is_help=True, help="The index of documents' vectors.")
app.callback()(lambda: None)
out = Console(highlight=False)

Engine = Literal["milvus", "pgvector"]


@app.command()
def migrate(
    to: Annotated[Engine, typer.Option("--to", help="The engine that answers searches afterwards.")],
    alone: Annotated[
        bool, typer.Option(help="Fill only this engine afterwards and empty the other one; going back takes longer.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Move the index to another engine while the services run. A stopped migration goes on if it is started again."""
    access = operator.engines_access()
    with Progress() as progress:
        progress.show(f"prepare {to}")
        done = operator.run(
            _migrate(
                access["postgres"]["url"],
                access["milvus"]["url"],
                to,
                alone,
                partial(progress.count, f"texts are in {to}"),
            )
        )
    if as_json:
        print_json(asdict(done))
    else:
        out.print(
            f"Searches look in {to} now. It has {done.texts} texts; for {done.sampled} sampled passages it "
            f"found {done.recall:.1%} of the exact neighbours."
        )


async def _migrate(
    database_url: str, milvus_url: str, to: Engine, alone: bool, progress: Callable[[int, int], None]
) -> Migrated:
    async with operator.database(database_url, "memory") as database:
        make = partial(make_index, database, milvus_url, "")
        return await move(database, to, make, alone=alone, progress=progress)


@app.command()
def rebuild(
    tenant: Annotated[str | None, typer.Option(help="The id of one tenant; otherwise all.")] = None,
    as_json: Json = False,
) -> None:
    """Fill the index again from PostgreSQL while the services run. They go on if this command is stopped."""
    access = operator.engines_access()
    with Progress() as progress:
        progress.show("mark the texts")
        texts = operator.run(
            _rebuild(
                access["postgres"]["url"],
                tenant,
                partial(progress.count, "texts are in the index"),
            )
        )
    if as_json:
        print_json({"texts": texts})
    else:
        out.print(f"The index has all {texts} texts again.")


async def _rebuild(database_url: str, tenant: str | None, progress: Callable[[int, int], None]) -> int:
    if tenant is not None:
        async with operator.database(database_url, "user") as users, users.begin() as tx:
            if not await tx.sql("SELECT FROM tenant WHERE tenant_id = $1 AND erased_at IS NULL", tenant):
                raise NotFound(f"--tenant {tenant}: does not exist in this stack")
    async with operator.database(database_url, "memory") as database:
        return await build_again(database, tenant, progress)


@app.command()
def status(as_json: Json = False) -> None:
    """Show the index, and how far a change of the embedding model is."""
    shown = operator.run(_status(operator.engines_access()["postgres"]["url"]))
    if as_json:
        print_json(shown)
        return
    for model in shown:
        out.print(f"{model.key}: {model.state}, has {model.texts - model.waiting} of {model.texts} texts")
        if model.error:
            out.print(f"  last error: {printable(model.error)}", markup=False)


async def _status(database_url: str) -> list[ModelState]:
    async with operator.database(database_url, "memory") as database, database.begin() as tx:
        return await states(tx)
