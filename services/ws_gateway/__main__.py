"""Gateway of live streams: what happens in a run, to whoever watches."""

from functools import lru_cache

from infra.security.subjects import erasure
from infra.service.service import Runtime, Service
from infra.stores.cache import Cache
from services.ws_gateway import api, handlers
from services.ws_gateway.hub import Hub
from services.ws_gateway.settings import GatewaySettings


@lru_cache(maxsize=1)
def hub(runtime: Runtime) -> Hub:
    """One for the process: what the tail hears reaches the streams."""
    return Hub(Cache(runtime.cache), runtime.stopping)


service = Service("ws_gateway", GatewaySettings)
service.serve_http(api.routes(hub))
service.consume(handlers.show, hub=hub)
service.consume(erasure("ws_gateway"))

if __name__ == "__main__":
    service.run()
