"""The settings of the gateway, read from the environment."""

from infra.service.settings import Settings


class GatewaySettings(Settings):
    agent_url: str
    """The agent's internal base URL."""
    user_grpc: str
    """The internal ``host:port`` of the user service's gRPC."""
