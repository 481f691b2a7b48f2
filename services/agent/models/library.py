"""The models by name."""

from __future__ import annotations

import httpx2

from services.agent.models import scripted
from services.agent.models.breaker import Breaker
from services.agent.models.contract import Endpoint, Model
from services.agent.models.providers import Providers


class Models:
    """Finds the model for a name ``<family>/<model>``. `transport`: the transport of outgoing calls."""

    def __init__(self, transport: httpx2.AsyncBaseTransport) -> None:
        self._providers = Providers(transport)
        self._scripted = scripted.Scripted()
        self._breaker = Breaker()

    def model(self, name: str, endpoint: Endpoint) -> Model:
        if name == scripted.NAME:
            return self._scripted
        # The key is part of the circuit: a refusal of one tenant's key says nothing about another's.
        circuit = name.partition("/")[0], endpoint
        return self._breaker.guard(circuit, self._providers.model(name, endpoint))
