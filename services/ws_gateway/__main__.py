"""Starts the gateway of live streams: it sends the events of runs to the clients that follow them."""

from functools import lru_cache

from infra.security.subjects import erasure
from infra.service.service import Runtime, Service
from infra.stores.cache import Cache
from services.ws_gateway import api, handlers
from services.ws_gateway.clients import Clients
from services.ws_gateway.hub import Hub
from services.ws_gateway.keys import SAFE, ApiKeys
from services.ws_gateway.settings import GatewaySettings


@lru_cache(maxsize=1)
def hub(runtime: Runtime) -> Hub:
    """The hub of the process: it passes the tail's facts to the streams."""
    keys = ApiKeys(runtime.channels.to(runtime.settings.user_grpc, "user", safe=SAFE))
    return Hub(Cache(runtime.cache), Clients(keys, runtime.stopping))


service = Service("ws_gateway", GatewaySettings)
service.serve_http(api.routes(hub))
service.consume(handlers.pass_on, hub=hub)
service.consume(erasure("ws_gateway"))
service.erase_tenants()

if __name__ == "__main__":
    service.run()
