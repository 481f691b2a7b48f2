"""Makes the index of an engine and an embedding model, in the service and in the operator's commands."""

from __future__ import annotations

from infra.postgres.database import Database
from services.memory.indexes.filling import refill
from services.memory.indexes.index import VectorIndex
from services.memory.indexes.milvus import MilvusIndex
from services.memory.indexes.pgvector import PgvectorIndex


def make_index(database: Database, milvus_url: str, prefix: str, engine: str, model: str) -> VectorIndex:
    """prefix: as of `MilvusIndex`."""
    if engine == "pgvector":
        return PgvectorIndex(database, model)
    return MilvusIndex(milvus_url, prefix, model, lambda name: refill(database, name))
