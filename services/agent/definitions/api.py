"""HTTP API of agents."""

from __future__ import annotations

import asyncio
import re
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request
from starlette.responses import Response

from infra.clock import uuid7
from infra.errors import InvalidMessage, NotFound, Transient
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.service.api import Paging, Reader, Writer, id_cursor, page
from infra.service.idempotency import once
from infra.service.service import Runtime
from infra.web import rpc
from infra.web.json_schema import check_schema
from infra.web.json_text import NAME_PATTERN
from protos.billing.v1 import billing_pb2
from protos.plugin.v1 import plugin_pb2
from services.agent import adapters
from services.agent.definitions import store
from services.agent.definitions.models import AgentChange, AgentView, NewAgent, Provider


def router(runtime: Runtime) -> APIRouter:
    routes = APIRouter(prefix="/api/v1/agents", tags=["agents"])
    plugin = adapters.plugin(runtime)
    billing = adapters.billing(runtime)

    async def reachable(field: str, model: str, provider: Provider | None, key: bytes | None) -> None:
        base_url = provider.base_url if provider else None
        if not model.startswith("scripted/") and key is None and not base_url:
            raise InvalidMessage(f"{field}.api_key", "is missing")
        if base_url:
            try:
                await runtime.outgoing.check(base_url)
            except InvalidMessage as error:
                raise InvalidMessage(f"{field}.base_url", error.reason) from error
            except Transient:
                pass  # the name does not resolve now; it may later

    async def check(tenant_id: str, definition: NewAgent, keys: store.ProviderKeys) -> None:
        """Raises InvalidMessage for a definition that cannot work: no key, a private address, an unknown tool."""
        # Not in the model, which also reads the names that were stored before.
        if not re.fullmatch(NAME_PATTERN, definition.name):
            raise InvalidMessage("name", "must not have line breaks or invisible characters")
        await reachable("provider", definition.model, definition.provider, keys.own)
        if fallback := definition.fallback:
            if fallback.provider is None and fallback.model.partition("/")[0] != definition.model.partition("/")[0]:
                raise InvalidMessage(
                    "fallback.provider", "is missing; the agent's own provider serves another family of models"
                )
            if fallback.provider:
                await reachable("fallback.provider", fallback.model, fallback.provider, keys.fallback)
        if definition.output_schema is not None:
            # In a thread, as a schema may ask for much work.
            await asyncio.to_thread(check_schema, "output_schema", definition.output_schema)
        names = [*definition.tools, *(colleague.name for colleague in definition.agents)]
        for n, colleague in enumerate(definition.agents):
            if names.count(colleague.name) > 1:
                raise InvalidMessage(f"agents[{n}].name", f"{colleague.name} is named twice")
            async with runtime.request.begin(tenant_id=tenant_id) as tx:
                try:
                    await store.load(tx, colleague.agent_id)
                except NotFound as error:
                    raise InvalidMessage(f"agents[{n}].agent_id", f"is not the id of an agent: {error}") from error
        for n, name in enumerate(definition.approval):
            if name not in names:
                raise InvalidMessage(f"approval[{n}]", f"{name} is not one of the agent's tools")
        if definition.tools:
            request = plugin_pb2.ToolsRequest(names=definition.tools)
            try:
                reply = await plugin.Tools(request, metadata=rpc.tenant_metadata(tenant_id))
            except Transient:
                return  # the plugin service is unavailable; a run reports a missing tool
            found = {tool.name for tool in reply.tools}
            for n, name in enumerate(definition.tools):
                if name not in found:
                    raise InvalidMessage(f"tools[{n}]", f"{name} is not a tool that this tenant may use")

    async def warnings(tenant_id: str, definition: NewAgent) -> list[str]:
        """The faults that do not keep the agent from working. Empty if billing does not answer."""
        models = [definition.model, *([definition.fallback.model] if definition.fallback else [])]
        try:
            reply = await billing.Unpriced(
                billing_pb2.UnpricedRequest(resources=models), metadata=rpc.tenant_metadata(tenant_id)
            )
        except Transient:
            return []
        return [
            f"model: {name} has no price; its use is held for review, and each call reserves a high amount of credit"
            for name in reply.resources
        ]

    def sealed(tenant_id: str, agent_id: UUID, body: NewAgent) -> store.ProviderKeys:
        """The API keys in the body, encrypted."""
        providers = body.provider, body.fallback.provider if body.fallback else None
        given = (provider.api_key if provider else None for provider in providers)
        return store.ProviderKeys(
            *(
                store.seal_key(runtime.cipher, tenant_id, agent_id, key.get_secret_value()) if key else None
                for key in given
            )
        )

    @routes.post("", status_code=201, response_model=AgentView)
    async def create_agent(body: NewAgent, who: Writer, request: Request) -> Response:
        """Creates an agent. A provider's api_key is stored encrypted and never shown."""
        agent_id = uuid7()
        keys = sealed(who.tenant_id, agent_id, body)
        await check(who.tenant_id, body, keys)
        found = await warnings(who.tenant_id, body)

        async def work(tx: Tx) -> tuple[int, AgentView]:
            agent = await store.insert(tx, agent_id, body, keys, who.actor)
            audit(tx, who.actor, "agent.create", "agent", str(agent_id), model=body.model)
            return 201, agent.view().model_copy(update={"warnings": found})

        return await once(request, runtime, who, work)

    @routes.get("")
    async def list_agents(who: Reader, paging: Paging, short: bool = False) -> dict[str, Any]:
        """The tenant's agents, the oldest first. A page of long definitions has fewer than `limit`. `short`: only the
        id, name, enabled and created_at of each."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            after = id_cursor(paging)
            if short:
                names = await store.listed_short(tx, after, paging.limit + 1)
                return page(names, paging, lambda agent: str(agent.id))
            agents, more = await store.listed(tx, after, paging.limit)
        return page([agent.view() for agent in agents], paging, lambda agent: str(agent.id), more=more)

    @routes.get("/{agent_id}")
    async def get_agent(agent_id: UUID, who: Reader) -> AgentView:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            return (await store.load(tx, agent_id)).view()

    @routes.patch("/{agent_id}")
    async def change_agent(agent_id: UUID, body: AgentChange, who: Writer) -> AgentView:
        """Changes the given fields. Active runs keep the version that they began with."""
        new = sealed(who.tenant_id, agent_id, body)
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            before = await store.load(tx, agent_id)
        await check(who.tenant_id, _merged(before, body), _keys(before, body, new))
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            agent = await store.lock(tx, agent_id)
            changed = await store.change(tx, agent, _merged(agent, body), _keys(agent, body, new), who.actor)
            audit(
                tx,
                who.actor,
                "agent.change",
                "agent",
                str(agent_id),
                fields=", ".join(sorted(body.model_fields_set)),
                version=str(changed.version),
            )
        found = await warnings(who.tenant_id, changed.definition)
        return changed.view().model_copy(update={"warnings": found})

    @routes.delete("/{agent_id}", status_code=204)
    async def delete_agent(agent_id: UUID, who: Writer) -> None:
        """Deletes an agent with its definitions. Its runs can still be read, and further messages to it are refused.
        409 while a run is not over."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await store.delete(tx, agent_id)
            audit(tx, who.actor, "agent.delete", "agent", str(agent_id))

    return routes


def _merged(agent: store.StoredAgent, change: AgentChange) -> NewAgent:
    update = {name: getattr(change, name) for name in change.model_fields_set}
    return agent.definition.model_copy(update={"enabled": agent.enabled} | update)


def _keys(agent: store.StoredAgent, change: AgentChange, new: store.ProviderKeys) -> store.ProviderKeys:
    """A key stays only with the address that it was given for: a new address may belong to someone else."""
    before, after = agent.definition, _merged(agent, change)
    own, fallback = agent.keys
    if _base_url(before.provider) != _base_url(after.provider) or after.provider is None:
        own = None
    was, becomes = (definition.fallback.provider if definition.fallback else None for definition in (before, after))
    if _base_url(was) != _base_url(becomes) or becomes is None:
        fallback = None
    return store.ProviderKeys(new.own or own, new.fallback or fallback)


def _base_url(provider: Provider | None) -> str | None:
    return provider.base_url if provider else None
