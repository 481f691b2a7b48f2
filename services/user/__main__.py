"""Starts the user service: tenants, their members and API keys; authentication for the gateway."""

from infra.security.subjects import erasure
from infra.service.service import Service
from services.user import api, authentication, erasing, rpc
from services.user.settings import UserSettings

service = Service("user", UserSettings)
service.serve_http(authentication.routes)
service.serve_http(api.routes)
service.serve_grpc(rpc.directory)
service.serve_grpc(rpc.keys)
service.consume(erasure("user"))
service.erase_tenants(("tenant", "tenant_erasure"))
service.consume(erasing.note_progress)

if __name__ == "__main__":
    service.run()
