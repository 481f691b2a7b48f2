"""What the gateway reads from the environment."""

from infra.service.settings import Settings


class GatewaySettings(Settings):
    agent_url: str
    """The agent's base URL, inside."""
    user_grpc: str
    """The user service's gRPC, host:port, inside."""
