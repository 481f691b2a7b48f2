"""The models by name."""

from __future__ import annotations

import threading
from importlib import import_module

import httpx2

from infra.service.process import freeze_loaded_modules
from services.agent.models import scripted
from services.agent.models.breaker import Breaker
from services.agent.models.contract import Model, ModelEndpoint
from services.agent.models.providers import Providers


def _import_libraries() -> None:
    import_module("services.agent.models.claude")
    freeze_loaded_modules()


class Models:
    """Finds the model for a name ``<family>/<model>``. `transport`: the transport of outgoing calls."""

    def __init__(self, transport: httpx2.AsyncBaseTransport) -> None:
        self._providers = Providers(transport)
        # The providers' libraries take about as long to import as the rest of the service. A thread imports them while
        # the service connects and accepts messages; the first call that needs them waits for the thread if need be.
        threading.Thread(target=_import_libraries, daemon=True).start()
        self._scripted = scripted.Scripted()
        self._breaker = Breaker()

    def model(self, name: str, endpoint: ModelEndpoint) -> Model:
        if name == scripted.NAME:
            return self._scripted
        # The key is part of the circuit: a refusal of one tenant's key says nothing about another's.
        circuit = name.partition("/")[0], endpoint
        return self._breaker.guard(circuit, self._providers.model(name, endpoint))
