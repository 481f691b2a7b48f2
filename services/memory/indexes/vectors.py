"""The vectors of passages, replies and memories in PostgreSQL. A row has two places: while a new embedding model takes
over, it has a vector of the old model and one of the new model."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from infra.postgres.tx import Tx

# The tables with vectors, and their keys.
KEYS = {"passage": "id", "utterance": "run_id", "memory": "id"}


def of(model: str, row: str) -> str:
    """SQL: the vector by the model that the parameter names; NULL if the row has none."""
    return f"""
        CASE {model}::text
            WHEN {row}.model THEN {row}.vector
            WHEN {row}.other_model THEN {row}.other_vector
        END
    """


async def store(tx: Tx, table: str, model: str, kept: str | None, vectors: Mapping[UUID, bytes]) -> None:
    """Stores vectors by `model`. Those by the model `kept` stay beside them."""
    await tx.sql(
        f"""
        UPDATE {table} AS t
        SET model = CASE WHEN t.model = $2 THEN t.model ELSE $1 END,
            vector = CASE WHEN t.model = $2 THEN t.vector ELSE v.vector END,
            other_model = CASE WHEN t.model = $2 THEN $1 ELSE t.other_model END,
            other_vector = CASE WHEN t.model = $2 THEN v.vector ELSE t.other_vector END
        FROM unnest($3::uuid[], $4::bytea[]) AS v (id, vector)
        WHERE t.{KEYS[table]} = v.id
        """,
        model,
        kept,
        list(vectors),
        list(vectors.values()),
    )


async def forget(tx: Tx, table: str, where: str, model: str, *arguments: object) -> None:
    """Deletes the vectors by `model` of the rows for which `where` is true, whose parameters begin with $2."""
    await tx.sql(
        # Locks the rows in the order of their keys.
        f"""
        WITH own AS MATERIALIZED (
            SELECT {KEYS[table]} AS id
            FROM {table}
            WHERE {where} AND $1 IN (model, other_model)
            ORDER BY 1
            FOR UPDATE
        )
        UPDATE {table}
        SET model = nullif(model, $1),
            vector = CASE WHEN model <> $1 THEN vector END,
            other_model = nullif(other_model, $1),
            other_vector = CASE WHEN other_model <> $1 THEN other_vector END
        WHERE {KEYS[table]} IN (SELECT id FROM own)
        """,
        model,
        *arguments,
    )
