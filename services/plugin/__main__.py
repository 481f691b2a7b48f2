"""Plugin: the tools that agents may use. Runs each call once."""

from infra.security.subjects import erasure
from infra.service.service import Runtime, Service
from infra.stores.cache import Cache
from services.plugin import api, calls, handlers, manifest, rpc
from services.plugin.settings import PluginSettings


def cache(runtime: Runtime) -> Cache:
    return Cache(runtime.cache)


service = Service("plugin", PluginSettings)
service.seal(calls.SEALED, manifest.SEALED)
service.serve_http(api.routes)
service.serve_grpc(rpc.servicer)
service.consume(handlers.pass_on, cache=cache)
service.consume(erasure("plugin"))
service.erase_tenants()

if __name__ == "__main__":
    service.run()
