"""HTTP of plugin: a tenant's plugins, and the tools that its agents may use."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from uuid import UUID

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from infra.clock import utcnow, uuid7
from infra.errors import Conflict, InvalidMessage, NotFound
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.security.auth import Identity
from infra.service.api import Paging, Reader, Writer, api, page
from infra.service.idempotency import once
from infra.service.service import Runtime
from services.plugin import registry
from services.plugin.domain import Tool
from services.plugin.manifest import (
    Access,
    check_config,
    checked_plugin,
    checked_tools,
    named_tools,
    new_secret,
)
from services.plugin.models import NewPlugin, PluginChange, PluginList, PluginView, ToolList, ToolView
from services.plugin.publishing import changed
from services.plugin.tools import mcp
from services.plugin.tools.builtin import BUILTIN


def routes(runtime: Runtime) -> Sequence[BaseRoute]:
    router = APIRouter()

    @router.get("/api/v1/tools")
    async def list_tools(who: Reader, paging: Paging) -> ToolList:
        """Lists the tools that the tenant's agents may use now."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            found = await registry.offered(tx)
        views = [_tool(offer.tool, offer.plugin_name) for offer in found if offer.tool.name > (paging.after or "")]
        return ToolList.model_validate(page(views, paging, key=lambda view: view.name))

    @router.post("/api/v1/plugins", status_code=201, response_model=PluginView)
    async def register(new: NewPlugin, who: Writer, request: Request) -> Response:
        """Registers a tool server. An MCP server is asked for its tools.

        If the name of a tool is taken, a tool of kind http is refused (409), and a tool of an MCP server gets the
        plugin's name as a prefix.
        """
        # In threads and before the transaction: schemas may ask for much work, and the tenant's server for long.
        config_schema, tools = await asyncio.to_thread(checked_plugin, new)
        await runtime.outgoing.check(new.url)
        found = await mcp.discover(runtime.outgoing, new.url, new.headers) if new.kind == "mcp" else []
        checked, unusable = await asyncio.to_thread(checked_tools, found)
        made = new_secret() if new.kind == "http" and new.secret is None else None
        access = Access(made or new.secret or "", new.headers)

        async def work(tx: Tx) -> tuple[int, PluginView]:
            id_ = uuid7()
            plugin = registry.StoredPlugin(
                id_,
                new.name,
                new.kind,
                new.url,
                access.seal(runtime.cipher, who.tenant_id, str(id_)),
                sorted(new.headers),
                new.config,
                config_schema,
                True,
                utcnow(),
            )
            await registry.lock_names(tx)
            await registry.add_plugin(tx, plugin)
            taken = await registry.taken_names(tx)
            named, left_out = named_tools(checked, new.name, taken, {}) if new.kind == "mcp" else (tools, [])
            for n, (tool, _) in enumerate(named):
                if tool.name in taken:
                    raise Conflict(f"tools[{n}].name: a tool {tool.name} exists already")
            await registry.set_tools(tx, id_, named)
            changed(tx, new.name, "enabled")
            audit(tx, who.actor, "plugin.register", "plugin", str(id_), name=new.name, kind=new.kind)
            view = _view(plugin, [tool for tool, _ in named])
            return 201, view.model_copy(update={"left_out": unusable + left_out, "secret": made})

        return await once(request, runtime, who, work)

    @router.get("/api/v1/plugins")
    async def list_plugins(who: Reader, paging: Paging) -> PluginList:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            off = await registry.builtin_off(tx)
            stored = await registry.plugins(tx)
            tools = await registry.tools_of(tx, [plugin.id for plugin in stored])
        views = [_builtin(name, off) for name in BUILTIN]
        views += [_view(plugin, [tool for tool, _ in tools[plugin.id]]) for plugin in stored]
        views = sorted((view for view in views if view.name > (paging.after or "")), key=lambda view: view.name)
        return PluginList.model_validate(page(views, paging, key=lambda view: view.name))

    @router.get("/api/v1/plugins/{plugin_id}")
    async def show(plugin_id: str, who: Reader) -> PluginView:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            return await _shown(tx, plugin_id)

    @router.patch("/api/v1/plugins/{plugin_id}")
    async def change(plugin_id: str, body: PluginChange, who: Writer) -> PluginView:
        """Enables or disables a plugin, or replaces its config. The id of a built-in plugin is its name."""

        async def work(tx: Tx) -> PluginView:
            await (_switch if plugin_id in BUILTIN else _change)(tx, plugin_id, body, who)
            return await _shown(tx, plugin_id)

        return await runtime.request.run(work, tenant_id=who.tenant_id)

    @router.delete("/api/v1/plugins/{plugin_id}", status_code=204)
    async def delete(plugin_id: str, who: Writer) -> None:
        async def work(tx: Tx) -> None:
            plugin = await registry.plugin(tx, _id(plugin_id), lock=True)
            await tx.sql("DELETE FROM plugin WHERE id = $1", plugin.id)
            changed(tx, plugin.name, "disabled")
            audit(tx, who.actor, "plugin.delete", "plugin", plugin_id, name=plugin.name)

        await runtime.request.run(work, tenant_id=who.tenant_id)

    @router.post("/api/v1/plugins/{plugin_id}/refresh")
    async def refresh(plugin_id: str, who: Writer) -> PluginView:
        """Asks an MCP server for its tools again."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            plugin = await registry.plugin(tx, _id(plugin_id))
        if plugin.kind != "mcp":
            raise Conflict("only an MCP server lists its tools; to change the tools, delete and register this plugin")
        access = Access.open(plugin.access, runtime.cipher, who.tenant_id, plugin_id)
        found = await mcp.discover(runtime.outgoing, plugin.url, access.headers)
        checked, unusable = await asyncio.to_thread(checked_tools, found)

        async def work(tx: Tx) -> PluginView:
            await registry.lock_names(tx)
            current = await registry.plugin(tx, plugin.id, lock=True)
            tools = (await registry.tools_of(tx, [plugin.id]))[plugin.id]
            known = {remote_name: tool.name for tool, remote_name in tools}
            taken = await registry.taken_names(tx, without=plugin.id)
            named, left_out = named_tools(checked, plugin.name, taken, known)
            await registry.set_tools(tx, plugin.id, named)
            changed(tx, plugin.name, "updated")
            audit(tx, who.actor, "plugin.refresh", "plugin", plugin_id, tools=str(len(named)))
            view = _view(current, [tool for tool, _ in named])
            return view.model_copy(update={"left_out": unusable + left_out})

        return await runtime.request.run(work, tenant_id=who.tenant_id)

    return api("plugin", runtime, router)


async def _switch(tx: Tx, name: str, body: PluginChange, who: Identity) -> None:
    if body.config is not None:
        raise InvalidMessage("config", "is not allowed for a built-in plugin")
    if body.enabled is None:
        return
    if body.enabled:
        await tx.sql("DELETE FROM builtin_off WHERE name = $1", name)
    else:
        await tx.sql("INSERT INTO builtin_off VALUES ($1, $2) ON CONFLICT DO NOTHING", tx.tenant_id, name)
    _record_switch(tx, who, name, name, body.enabled)


async def _change(tx: Tx, plugin_id: str, body: PluginChange, who: Identity) -> None:
    plugin = await registry.plugin(tx, _id(plugin_id), lock=True)
    if body.config is not None:
        if plugin.kind != "http":
            raise InvalidMessage("config", "is allowed only for kind http")
        await asyncio.to_thread(check_config, body.config, plugin.config_schema)
        await registry.set_config(tx, plugin.id, body.config)
        changed(tx, plugin.name, "updated")
        audit(tx, who.actor, "plugin.configure", "plugin", plugin_id, name=plugin.name)
    if body.enabled is not None:
        await tx.sql("UPDATE plugin SET enabled = $2 WHERE id = $1", plugin.id, body.enabled)
        _record_switch(tx, who, plugin_id, plugin.name, body.enabled)


def _record_switch(tx: Tx, who: Identity, plugin_id: str, name: str, enabled: bool) -> None:
    changed(tx, name, "enabled" if enabled else "disabled")
    audit(tx, who.actor, "plugin.enable" if enabled else "plugin.disable", "plugin", plugin_id, name=name)


async def _shown(tx: Tx, plugin_id: str) -> PluginView:
    if plugin_id in BUILTIN:
        return _builtin(plugin_id, await registry.builtin_off(tx))
    plugin = await registry.plugin(tx, _id(plugin_id))
    tools = await registry.tools_of(tx, [plugin.id])
    return _view(plugin, [tool for tool, _ in tools[plugin.id]])


def _id(plugin_id: str) -> UUID:
    if plugin_id in BUILTIN:
        raise Conflict(f"{plugin_id} is built in; it can only be enabled or disabled")
    try:
        return UUID(plugin_id)
    except ValueError:
        raise NotFound(f"plugin {plugin_id}: not found") from None


def _view(plugin: registry.StoredPlugin, tools: Sequence[Tool]) -> PluginView:
    return PluginView(
        id=str(plugin.id),
        name=plugin.name,
        kind=plugin.kind,
        url=plugin.url,
        enabled=plugin.enabled,
        headers=plugin.header_names,
        config=dict(plugin.config),
        config_schema=dict(plugin.config_schema),
        tools=[_tool(tool, plugin.name) for tool in tools],
        created_at=plugin.created_at,
    )


def _builtin(name: str, off: set[str]) -> PluginView:
    tool, _ = BUILTIN[name]
    return PluginView(id=name, name=name, kind="builtin", enabled=name not in off, tools=[_tool(tool, name)])


def _tool(tool: Tool, plugin: str) -> ToolView:
    return ToolView(
        name=tool.name, description=tool.description, schema=dict(tool.schema), effect=tool.effect, plugin=plugin
    )
