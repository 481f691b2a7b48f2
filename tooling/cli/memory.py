"""``./claw memory``: the index of the memory service."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Literal

import msgspec
import typer
from rich.console import Console
from rich.progress import Progress

from infra.postgres.database import Database
from services.memory.embeddings import LocalEmbedder
from services.memory.handlers import refill
from services.memory.index import VectorIndex
from services.memory.migration import Migrated
from services.memory.migration import migrate as move
from services.memory.milvus import MilvusIndex
from services.memory.pgvector import PgvectorIndex
from tooling.stack import operator

app = typer.Typer(no_args_is_help=True, help="The index of documents' vectors.")
app.callback()(lambda: None)
out = Console(highlight=False)

Engine = Literal["milvus", "pgvector"]


@app.command()
def migrate(
    to: Annotated[Engine, typer.Option("--to", help="The engine that answers searches afterwards.")],
    alone: Annotated[
        bool, typer.Option(help="Fill only this engine afterwards; going back then takes longer.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Move the index to another engine while the services run. A stopped migration goes on if it is started again."""
    access = operator.engines_access()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"documents in {to}", total=None)
        done = operator.run(
            _migrate(
                access["postgres"]["url"],
                access["milvus"]["url"],
                to,
                alone,
                lambda inside, total: progress.update(task, completed=inside, total=total),
            )
        )
    if as_json:
        print(msgspec.json.encode(asdict(done)).decode())  # noqa: T201
    else:
        out.print(
            f"Searches look in {to} now. It has {done.documents} documents; for {done.sampled} sampled passages it "
            f"found {done.recall:.1%} of the exact neighbours."
        )


async def _migrate(
    database_url: str, milvus_url: str, to: Engine, alone: bool, progress: Callable[[int, int], None]
) -> Migrated:
    async with operator.database(database_url, "memory") as database:
        return await move(database, to, await index(database, milvus_url, to), alone=alone, progress=progress)


async def index(database: Database, milvus_url: str, engine: Engine) -> VectorIndex:
    """The index of the embedding model that most passages have."""
    async with database.begin() as tx:
        rows = await tx.sql(
            """
            SELECT model
            FROM passage
            WHERE model IS NOT NULL
            GROUP BY model
            ORDER BY count(*) DESC
            LIMIT 1
            """
        )
    model = rows[0][0] if rows else LocalEmbedder.model
    if engine == "pgvector":
        return PgvectorIndex(database, model)
    return MilvusIndex(milvus_url, "", model, lambda name: refill(database, name))
