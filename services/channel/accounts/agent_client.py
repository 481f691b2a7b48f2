"""Client of the agent service: checks that a tenant has an agent with a given id."""

from __future__ import annotations

from collections.abc import Sequence
from ssl import SSLContext
from uuid import UUID

import httpx

from infra.errors import InvalidMessage, describe
from infra.observe import telemetry
from infra.observe.logs import get_logger
from infra.security.auth import IDENTITY_HEADER, Identities, Identity
from infra.web.clients import service_client
from services.channel.accounts.channels import AgentRoute

TIMEOUT_SECONDS = 3.0


class Agents:
    """`url`: the base URL of the agent service. `tls`: for ``https``."""

    def __init__(self, url: str, identities: Identities, tls: SSLContext | None = None) -> None:
        self._url = url
        self._tls = tls
        self._identities = identities

    async def check_routes(self, routes: Sequence[AgentRoute], who: Identity) -> None:
        """As `check`, for the agent of each route."""
        seen: set[UUID] = set()
        for n, route in enumerate(routes):
            if route.agent_id not in seen:
                await self.check(route.agent_id, who, f"routes.{n}.agent_id")
                seen.add(route.agent_id)

    async def check(self, agent_id: UUID, who: Identity, field: str = "agent_id") -> None:
        """Raises InvalidMessage if the tenant has no such agent.

        If the agent service does not answer, any id is accepted: a message to a missing agent is refused later, and
        its run says why.
        """
        headers = {IDENTITY_HEADER: self._identities.on_behalf(who, "agent"), **telemetry.carrier()}
        try:
            async with service_client("agent", self._url, self._tls, TIMEOUT_SECONDS) as http:
                answer = await http.get(f"/api/v1/agents/{agent_id}", headers=headers)
        except httpx.TransportError as error:
            get_logger("channel.agents").warning(
                "could not check the agent of a channel; the id is accepted unchecked", error=describe(error)
            )
            return
        if answer.status_code == 404:
            raise InvalidMessage(field, "is not the id of an agent of this tenant")
