"""All models by name."""

from __future__ import annotations

import httpx2

from services.agent.models import scripted
from services.agent.models.contract import Endpoint, Model
from services.agent.models.providers import Providers


class Models:
    """``<family>/<model>`` → what answers. `transport`: of outgoing calls."""

    def __init__(self, transport: httpx2.AsyncBaseTransport) -> None:
        self._providers = Providers(transport)
        self._scripted = scripted.Scripted()

    def model(self, name: str, endpoint: Endpoint) -> Model:
        return self._scripted if name == scripted.NAME else self._providers.model(name, endpoint)
