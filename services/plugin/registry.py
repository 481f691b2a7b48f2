"""The stored plugins and tools of tenants, together with the built-in ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple
from uuid import UUID

import msgspec

from infra.errors import Conflict, NotFound
from infra.postgres.tx import Tx
from services.plugin.domain import Effect, Tool
from services.plugin.tools.builtin import BUILTIN

MAX_PLUGINS = 100
MAX_TOOLS_BYTES = 8 * 1024 * 1024
"""Of the descriptions and schemas of a tenant's tools: a list of tools reads all of them."""


class StoredPlugin(NamedTuple):
    """A plugin of a tenant, without its tools."""

    id: UUID
    name: str
    kind: Literal["http", "mcp"]
    url: str
    access: bytes
    """Secret and headers, sealed."""
    header_names: list[str]
    config: Mapping[str, Any]
    config_schema: Mapping[str, Any]
    enabled: bool
    created_at: datetime


class Offered(NamedTuple):
    """A tool that a tenant may use."""

    tool: Tool
    plugin: StoredPlugin | None
    """None for a built-in tool."""
    remote_name: str
    """The tool's name on its server."""

    @property
    def plugin_name(self) -> str:
        return self.plugin.name if self.plugin else self.tool.name


_PLUGIN = "p.id, p.name, p.kind, p.url, p.access, p.header_names, p.config, p.config_schema, p.enabled, p.created_at"
_TOOL = "t.name, t.description, t.schema, t.effect, t.remote_name"


async def plugins(tx: Tx) -> list[StoredPlugin]:
    """Returns all plugins of the tenant, by name."""
    return [_plugin(row) for row in await tx.sql(f"SELECT {_PLUGIN} FROM plugin p ORDER BY name")]


async def plugin(tx: Tx, id_: UUID, *, lock: bool = False) -> StoredPlugin:
    """Raises NotFound. lock: locks the row until the transaction ends."""
    rows = await tx.sql(f"SELECT {_PLUGIN} FROM plugin p WHERE id = $1{' FOR UPDATE' if lock else ''}", id_)
    if not rows:
        raise NotFound(f"plugin {id_}: not found")
    return _plugin(rows[0])


async def tools_of(tx: Tx, ids: Sequence[UUID]) -> dict[UUID, list[tuple[Tool, str]]]:
    """Returns plugin id → its tools with their remote names, by name."""
    found: dict[UUID, list[tuple[Tool, str]]] = {id_: [] for id_ in ids}
    for row in await tx.sql(
        f"SELECT {_TOOL}, plugin_id FROM tool t WHERE plugin_id = ANY($1::uuid[]) ORDER BY name", list(ids)
    ):
        found[row[5]].append(_tool(row))
    return found


async def builtin_off(tx: Tx) -> set[str]:
    """Returns the built-in plugins that the tenant has disabled."""
    return {name for (name,) in await tx.sql("SELECT name FROM builtin_off")}


async def offered(tx: Tx, names: Iterable[str] | None = None) -> list[Offered]:
    """Returns the tools that the tenant may use now, by name. names: only these tools; None: all."""
    wanted = None if names is None else list(names)
    off = await builtin_off(tx)
    found = [
        Offered(tool, None, name)
        for name, (tool, _) in BUILTIN.items()
        if name not in off and (wanted is None or name in wanted)
    ]
    for row in await tx.sql(
        f"""
        SELECT {_TOOL}, {_PLUGIN} FROM tool t JOIN plugin p ON p.id = t.plugin_id
        WHERE p.enabled AND ($1::text[] IS NULL OR t.name = ANY($1))
        """,
        wanted,
    ):
        tool, remote_name = _tool(row)
        found.append(Offered(tool, _plugin(row[5:]), remote_name))
    return sorted(found, key=lambda offer: offer.tool.name)


async def lock_names(tx: Tx) -> None:
    """Locks the names of the tenant's plugins and tools until the transaction ends."""
    await tx.take_turn(f"plugins of {tx.tenant_id}")


async def add_plugin(tx: Tx, new: StoredPlugin) -> None:
    """Stores a plugin. The caller has called `lock_names`.

    Raises Conflict if the name is taken, or if the tenant has MAX_PLUGINS plugins.
    """
    [(count,)] = await tx.sql("SELECT count(*) FROM plugin")
    if count >= MAX_PLUGINS:
        raise Conflict(f"a tenant may have {MAX_PLUGINS} plugins; delete one first")
    if new.name in BUILTIN or await tx.sql("SELECT 1 FROM plugin WHERE name = $1", new.name):
        raise Conflict(f"name: a plugin {new.name} exists already")
    await tx.sql(
        """
        INSERT INTO plugin (id, tenant_id, name, kind, url, access, header_names, config, config_schema, enabled,
        created_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
        """,
        new.id,
        tx.tenant_id,
        new.name,
        new.kind,
        new.url,
        new.access,
        new.header_names,
        _json(new.config),
        _json(new.config_schema),
        new.enabled,
        new.created_at,
    )


async def set_tools(tx: Tx, plugin_id: UUID, tools: Sequence[tuple[Tool, str]]) -> None:
    """Replaces the plugin's tools with these, each with its remote name.

    The caller has called `lock_names`, and has checked that no name is in `taken_names`. Raises Conflict if the
    tenant's tools have more than MAX_TOOLS_BYTES.
    """
    # In the order of the key, as every write of several rows.
    tools = sorted(tools, key=lambda named: named[0].name)
    await tx.sql("DELETE FROM tool WHERE plugin_id = $1", plugin_id)
    await tx.sql(
        """
        INSERT INTO tool (tenant_id, plugin_id, name, remote_name, description, schema, effect)
        SELECT $1, $2, n.* FROM unnest($3::text[], $4::text[], $5::text[], $6::text[], $7::text[]) AS n
        """,
        tx.tenant_id,
        plugin_id,
        [tool.name for tool, _ in tools],
        [remote_name for _, remote_name in tools],
        [tool.description for tool, _ in tools],
        [_json(tool.schema) for tool, _ in tools],
        [tool.effect for tool, _ in tools],
    )
    [(size,)] = await tx.sql("SELECT sum(octet_length(description) + octet_length(schema)) FROM tool")
    if size and size > MAX_TOOLS_BYTES:
        raise Conflict(f"tools: all tools of a tenant may have {MAX_TOOLS_BYTES} bytes; delete a plugin first")


async def set_config(tx: Tx, plugin_id: UUID, config: Mapping[str, Any]) -> None:
    await tx.sql("UPDATE plugin SET config = $2 WHERE id = $1", plugin_id, _json(config))


async def taken_names(tx: Tx, *, without: UUID | None = None) -> set[str]:
    """Returns the names of the tenant's tools and of the built-in ones, without the tools of the plugin `without`."""
    rows = await tx.sql("SELECT name FROM tool WHERE plugin_id IS DISTINCT FROM $1", without)
    return {*BUILTIN, *(name for (name,) in rows)}


def _plugin(row: Sequence[Any]) -> StoredPlugin:
    id_, name, kind, url, access, header_names, config, config_schema, enabled, created_at = row
    return StoredPlugin(
        UUID(str(id_)),
        name,
        kind,
        url,
        bytes(access),
        header_names,
        msgspec.json.decode(config),
        msgspec.json.decode(config_schema),
        enabled,
        created_at,
    )


def _tool(row: Sequence[Any]) -> tuple[Tool, str]:
    name, description, schema, effect, remote_name, *_ = row
    kind: Effect = effect
    return Tool(name, description, msgspec.json.decode(schema), kind), remote_name


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
