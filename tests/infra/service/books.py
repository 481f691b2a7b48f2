"""A read model of the sample's notebooks, and a program that verifies it, for a test to kill."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from infra.postgres.db import create_engine
from infra.postgres.read_models import Recorded, folded_read_model
from infra.postgres.tx import Tx
from infra.service.verification import verify
from tooling.testing.sample.desk.domain import WriteNote
from tooling.testing.sample.desk.publishing import NOTEBOOK

TABLE = "CREATE TABLE IF NOT EXISTS book (name text PRIMARY KEY, notes bigint NOT NULL, letters bigint NOT NULL)"


def fold(name: str, history: Sequence[Recorded]) -> Iterator[Mapping[str, Any]]:
    texts = [one.event.text for one in history]
    if "delete" not in texts:
        yield {"name": name, "notes": len(texts), "letters": sum(map(len, texts))}


# Small batches, so that a few notebooks are several.
BOOKS = replace(
    folded_read_model(
        NOTEBOOK,
        fold,
        name="books",
        table="book",
        key=("name",),
        columns=("notes", "letters"),
        stream="l.name",
        in_scope="l.name = ANY($1::text[])",
    ),
    batch=2,
)


async def write(tx: Tx, name: str, text: str) -> None:
    """An event, and its row in the same transaction."""
    await tx.decide(NOTEBOOK.stream(name), WriteNote(text))
    await tx.sql(
        """
        INSERT INTO book AS b VALUES ($1, 1, length($2))
        ON CONFLICT (name) DO UPDATE SET notes = b.notes + 1, letters = b.letters + excluded.letters
        """,
        name,
        text,
    )


async def main(url: str) -> None:
    engine = create_engine(url, schema="sample_desk", pool_size=2)
    await verify(engine, "sample_desk", BOOKS, switch=True)
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
