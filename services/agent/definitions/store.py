"""The tables ``agent`` and ``agent_version``. Providers' keys are stored encrypted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import UUID

from infra.errors import Conflict, NotFound
from infra.postgres.tx import Tx
from infra.security.crypto import Cipher
from infra.security.rewrap import SealedColumn
from infra.service.api import of_one_page
from services.agent.definitions.models import (
    AgentView,
    FallbackView,
    NewAgent,
    Provider,
    ProviderView,
    ShortAgentView,
)
from services.agent.definitions.queue_modes import QueueMode
from services.agent.models.contract import ModelEndpoint

MAX_AGENTS = 1_000
"""Of a tenant. ``GET /v1/models`` lists all of them."""
KEPT_CHARACTERS = 10_000
"""Of a definition that a process keeps in memory."""
_PURPOSE = "model provider key"
SEALED = tuple(
    SealedColumn("agent_version", column, _PURPOSE, ("tenant_id", "agent_id::text"))
    for column in ("api_key", "fallback_key")
)
_COLUMNS = (
    "a.id, a.tenant_id, v.version, a.enabled, v.definition, v.api_key, v.fallback_key, a.created_at, v.created_at "
    "FROM agent a JOIN agent_version v ON v.agent_id = a.id"
)
# The current versions of a page of the tenant's agents.
_OF_TENANT = """
    FROM agent a
    JOIN agent_version v ON v.agent_id = a.id AND v.version = a.version
    WHERE a.tenant_id = $1 AND ($2::uuid IS NULL OR a.id > $2)
    ORDER BY a.id
    LIMIT $3
"""


class ProviderKeys(NamedTuple):
    """The encrypted keys of an agent's provider and of its fallback's provider."""

    own: bytes | None = None
    fallback: bytes | None = None


@dataclass(frozen=True)
class StoredAgent:
    """One version of an agent."""

    id: UUID
    tenant_id: str
    version: int
    enabled: bool
    definition: NewAgent
    keys: ProviderKeys
    created_at: datetime
    updated_at: datetime
    """The time when this version was created."""

    def models(self, cipher: Cipher) -> list[tuple[str, ModelEndpoint]]:
        """The models to call in this order, with their endpoints and decrypted keys."""
        definition = self.definition
        own = definition.model, self._endpoint(cipher, definition.provider, self.keys.own)
        if definition.fallback is None:
            return [own]
        fallback = definition.fallback
        if fallback.provider is None:
            return [own, (fallback.model, own[1])]
        return [own, (fallback.model, self._endpoint(cipher, fallback.provider, self.keys.fallback))]

    def _endpoint(self, cipher: Cipher, provider: Provider | None, sealed: bytes | None) -> ModelEndpoint:
        key = cipher.open(sealed, _PURPOSE, self.tenant_id, str(self.id)).decode() if sealed else None
        return ModelEndpoint(provider.base_url if provider else None, key)

    def view(self) -> AgentView:
        definition = self.definition
        fallback = definition.fallback
        return AgentView(
            **definition.model_dump(exclude={"provider", "fallback", "enabled"}),
            id=self.id,
            version=self.version,
            provider=_shown(definition.provider),
            fallback=FallbackView(model=fallback.model, provider=_shown(fallback.provider)) if fallback else None,
            enabled=self.enabled,
            created_at=self.created_at,
            updated_at=self.updated_at,
        )


def _shown(provider: Provider | None) -> ProviderView | None:
    return ProviderView(base_url=provider.base_url) if provider else None


def seal_key(cipher: Cipher, tenant_id: str, agent_id: UUID, key: str) -> bytes:
    return cipher.seal(key, _PURPOSE, tenant_id, str(agent_id))


async def insert(tx: Tx, agent_id: UUID, definition: NewAgent, keys: ProviderKeys, created_by: str) -> StoredAgent:
    """Raises Conflict if the tenant has MAX_AGENTS agents."""
    # Creations at the same time take turns: each counts the agents of those before it.
    await tx.take_turn(f"agents of {tx.tenant_id}")
    [(count,)] = await tx.sql("SELECT count(*) FROM agent WHERE tenant_id = $1", tx.tenant_id)
    if count >= MAX_AGENTS:
        raise Conflict(f"a tenant may have {MAX_AGENTS} agents; delete one first")
    await tx.sql(
        "INSERT INTO agent (id, tenant_id, version, enabled) VALUES ($1, $2, 1, $3)",
        agent_id,
        tx.tenant_id,
        definition.enabled,
    )
    await _insert_version(tx, agent_id, 1, definition, keys, created_by)
    return await load(tx, agent_id)


async def change(tx: Tx, agent: StoredAgent, definition: NewAgent, keys: ProviderKeys, changed_by: str) -> StoredAgent:
    """Creates the next version, unless only `enabled` differs. The caller has locked the agent by `lock`."""
    if (definition.model_copy(update={"enabled": True}), keys) != (
        agent.definition.model_copy(update={"enabled": True}),
        agent.keys,
    ):
        await _insert_version(tx, agent.id, agent.version + 1, definition, keys, changed_by)
        await tx.sql("UPDATE agent SET version = version + 1 WHERE id = $1", agent.id)
    await tx.sql("UPDATE agent SET enabled = $2 WHERE id = $1", agent.id, definition.enabled)
    return await load(tx, agent.id)


async def delete(tx: Tx, agent_id: UUID) -> None:
    """Deletes the agent and all its versions. Its runs stay. Raises NotFound, and Conflict while one is not over."""
    await lock(tx, agent_id)
    if await tx.sql(
        """
        SELECT 1 FROM run
        WHERE tenant_id = $1 AND agent_id = $2 AND status IN ('queued', 'running', 'waiting')
        LIMIT 1
        """,
        tx.tenant_id,
        agent_id,
    ):
        raise Conflict(f"agent {agent_id}: has runs that are not over; disable it, and wait for them or cancel them")
    await tx.sql("DELETE FROM agent_version WHERE agent_id = $1", agent_id)
    await tx.sql("DELETE FROM agent WHERE id = $1", agent_id)


async def _insert_version(
    tx: Tx, agent_id: UUID, version: int, definition: NewAgent, keys: ProviderKeys, created_by: str
) -> None:
    await tx.sql(
        """
        INSERT INTO agent_version (agent_id, version, tenant_id, definition, api_key, fallback_key, created_by)
        VALUES ($1, $2, $3, $4, $5, $6, $7)
        """,
        agent_id,
        version,
        tx.tenant_id,
        definition.model_dump_json(
            exclude={"enabled": True, "provider": {"api_key"}, "fallback": {"provider": {"api_key"}}}
        ),
        *keys,
        created_by,
    )


async def load(tx: Tx, agent_id: UUID, version: int | None = None) -> StoredAgent:
    """The given version of the agent, or the newest. Raises NotFound, also for another tenant's agent."""
    rows = await tx.sql(
        f"SELECT {_COLUMNS} AND v.version = coalesce($2, a.version) WHERE a.id = $1 AND a.tenant_id = $3",
        agent_id,
        version,
        tx.tenant_id,
    )
    if not rows:
        raise NotFound(f"agent {agent_id}")
    return stored(rows[0])


async def lock(tx: Tx, agent_id: UUID) -> StoredAgent:
    """Locks the agent's row against other changes, then loads it."""
    await tx.sql("SELECT FROM agent WHERE id = $1 FOR UPDATE", agent_id)
    return await load(tx, agent_id)


async def listed(tx: Tx, after: UUID | None, limit: int) -> tuple[Sequence[StoredAgent], bool]:
    """At most `limit` of the tenant's agents in the order of their creation, and whether others follow.

    Their definitions have PAGE_BYTES together, or a little more.
    """
    sizes = await tx.sql(
        f"SELECT a.id, octet_length(v.definition) {_OF_TENANT}",
        tx.tenant_id,
        after,
        limit + 1,
    )
    ids: list[UUID] = of_one_page(sizes[:limit])
    rows = await tx.sql(f"SELECT {_COLUMNS} AND v.version = a.version WHERE a.id = ANY($1::uuid[]) ORDER BY a.id", ids)
    return [stored(row) for row in rows], len(sizes) > len(ids)


async def listed_short(tx: Tx, after: UUID | None, limit: int) -> list[ShortAgentView]:
    """At most `limit` of the tenant's agents in the order of their creation. Their definitions stay in the database."""
    rows = await tx.sql(
        f"SELECT a.id, (v.definition::json -> 'name')::text, a.enabled, a.created_at {_OF_TENANT}",
        tx.tenant_id,
        after,
        limit,
    )
    # The name is decoded here: the database refuses to decode a definition with a zero byte in any of its texts.
    return [
        ShortAgentView(id=id_, name=json.loads(name), enabled=enabled, created_at=created_at)
        for id_, name, enabled, created_at in rows
    ]


async def queue_mode(tx: Tx, agent_id: UUID) -> QueueMode:
    """The queue mode of the agent. For a missing agent it is ``followup``, so that each message gets a refusal."""
    try:
        return (await load(tx, agent_id)).definition.queue_mode
    except NotFound:
        return "followup"


def mode_of(definition: str | None) -> QueueMode:
    """The queue mode of a stored definition. For a missing agent it is ``followup``, as in `queue_mode`."""
    return "followup" if definition is None else _definition(definition).queue_mode


def stored(row: Sequence[Any]) -> StoredAgent:
    """The agent of a row with the columns of `_COLUMNS`."""
    id_, tenant_id, version, enabled, definition, own, fallback, created_at, updated_at = row
    return StoredAgent(
        id_,
        tenant_id,
        version,
        enabled,
        _definition(definition),
        ProviderKeys(*(None if key is None else bytes(key) for key in (own, fallback))),
        created_at,
        updated_at,
    )


# A definition never changes, and each run of an agent reads it again.
_kept = lru_cache(maxsize=1_000)(NewAgent.model_validate_json)


def _definition(stored_json: str) -> NewAgent:
    # The long ones of one tenant would fill the memory.
    return _kept(stored_json) if len(stored_json) <= KEPT_CHARACTERS else NewAgent.model_validate_json(stored_json)
