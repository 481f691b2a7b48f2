"""What plugin reads from the environment."""

from infra.service.settings import Settings


class PluginSettings(Settings):
    memory_grpc: str
    """``host:port``, for the tool knowledge_search."""
