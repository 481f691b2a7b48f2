"""HTTP of agents."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request
from starlette.responses import Response

from infra import rpc
from infra.api import Paging, Reader, Writer, page
from infra.audit import audit
from infra.clock import uuid7
from infra.errors import InvalidMessage, Transient
from infra.idempotency import once
from infra.service import Runtime
from infra.tx import Tx
from protos.plugin.v1 import plugin_pb2
from services.agent import adapters
from services.agent.definitions import store
from services.agent.definitions.models import AgentChange, AgentView, NewAgent, Provider


def router(runtime: Runtime) -> APIRouter:
    routes = APIRouter(prefix="/api/v1/agents", tags=["agents"])
    plugin = adapters.plugin(runtime)

    async def check(tenant_id: str, definition: NewAgent, has_key: bool) -> None:
        """Raises InvalidMessage for what cannot work: no key, an address inside, a tool that is not there."""
        provider = definition.provider or Provider()
        for n, name in enumerate(definition.approval):
            if name not in definition.tools:
                raise InvalidMessage(f"approval[{n}]", f"{name} is none of the agent's tools")
        if not definition.model.startswith("scripted/") and not (has_key or provider.base_url):
            raise InvalidMessage("provider.api_key", "is missing")
        if provider.base_url:
            try:
                await runtime.outgoing.check(provider.base_url)
            except InvalidMessage as error:
                raise InvalidMessage("provider.base_url", error.reason) from error
            except Transient:
                pass  # a name that does not resolve now may later
        if definition.tools:
            request = plugin_pb2.ToolsRequest(names=definition.tools)
            try:
                reply = await plugin.Tools(request, metadata=rpc.tenant_metadata(tenant_id))
            except Transient:
                return  # a run says so, too
            found = {tool.name for tool in reply.tools}
            for n, name in enumerate(definition.tools):
                if name not in found:
                    raise InvalidMessage(f"tools[{n}]", f"there is no tool {name} that this tenant may use")

    @routes.post("", status_code=201, response_model=AgentView)
    async def create_agent(body: NewAgent, who: Writer, request: Request) -> Response:
        """Makes an agent. The provider's api_key is stored sealed and never shown."""
        key = body.provider.api_key if body.provider else None
        await check(who.tenant_id, body, key is not None)

        async def work(tx: Tx) -> tuple[int, AgentView]:
            agent_id = uuid7()
            sealed = store.seal_key(runtime.cipher, who.tenant_id, agent_id, key.get_secret_value()) if key else None
            agent = await store.insert(tx, agent_id, body, sealed, who.actor)
            audit(tx, who.actor, "agent.create", "agent", str(agent_id), model=body.model)
            return 201, agent.view()

        return await once(request, runtime, who, work)

    @routes.get("")
    async def list_agents(who: Reader, paging: Paging) -> dict[str, Any]:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            try:
                after = UUID(paging.after) if paging.after else None
            except ValueError:
                raise InvalidMessage("cursor", "is none that this list gave") from None
            agents = await store.listed(tx, after, paging.limit + 1)
        return page([agent.view() for agent in agents], paging, lambda agent: str(agent.id))

    @routes.get("/{agent_id}")
    async def get_agent(agent_id: UUID, who: Reader) -> AgentView:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            return (await store.load(tx, agent_id)).view()

    @routes.patch("/{agent_id}")
    async def change_agent(agent_id: UUID, body: AgentChange, who: Writer) -> AgentView:
        """Changes what is given. Runs under way keep to the version that they began with."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            before = await store.load(tx, agent_id)
        await check(who.tenant_id, _merged(before, body), _keeps_key(before, body) or _new_key(body) is not None)
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            agent = await store.lock(tx, agent_id)
            if new := _new_key(body):
                sealed: bytes | None = store.seal_key(runtime.cipher, who.tenant_id, agent_id, new)
            else:
                sealed = agent.api_key if _keeps_key(agent, body) else None
            changed = await store.change(tx, agent, _merged(agent, body), sealed, who.actor)
            audit(
                tx,
                who.actor,
                "agent.change",
                "agent",
                str(agent_id),
                fields=", ".join(sorted(body.model_fields_set)),
                version=str(changed.version),
            )
        return changed.view()

    return routes


def _merged(agent: store.StoredAgent, change: AgentChange) -> NewAgent:
    update = {name: getattr(change, name) for name in change.model_fields_set}
    return agent.definition.model_copy(update={"enabled": agent.enabled} | update)


def _new_key(change: AgentChange) -> str | None:
    provider = change.provider
    return provider.api_key.get_secret_value() if provider and provider.api_key else None


def _keeps_key(agent: store.StoredAgent, change: AgentChange) -> bool:
    """A key goes on only to the address that it was given for: a new one could be anybody's."""
    if agent.api_key is None:
        return False
    if "provider" not in change.model_fields_set:
        return True
    before = agent.definition.provider.base_url if agent.definition.provider else None
    return change.provider is not None and change.provider.base_url == before
