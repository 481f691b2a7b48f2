"""What the channel service asks of the agent: whether a tenant has an agent of that id."""

from __future__ import annotations

from uuid import UUID

import httpx

from infra.errors import InvalidMessage, describe
from infra.observe import telemetry
from infra.observe.logs import get_logger
from infra.security.auth import IDENTITY_HEADER, Identities, Identity

TIMEOUT_SECONDS = 3.0


class Agents:
    """`url`: the agent's base."""

    def __init__(self, url: str, identities: Identities) -> None:
        self._url = url
        self._identities = identities

    async def check(self, agent_id: UUID, who: Identity) -> None:
        """Raises InvalidMessage where the tenant has no such agent.

        While the agent service does not answer any will do: what is written to one that is not there is refused, and
        its run says why.
        """
        scope = Identity(who.actor, who.tenant_id, frozenset(("read",)))
        headers = {IDENTITY_HEADER: self._identities.token(scope), **telemetry.carrier()}
        try:
            async with httpx.AsyncClient(base_url=self._url, trust_env=False, timeout=TIMEOUT_SECONDS) as http:
                answer = await http.get(f"/api/v1/agents/{agent_id}", headers=headers)
        except httpx.TransportError as error:
            get_logger("channel.agents").warning("a channel's agent cannot be checked now", error=describe(error))
            return
        if answer.status_code == 404:
            raise InvalidMessage("agent_id", "there is no such agent")
