"""Settings of plugin, read from the environment."""

from infra.service.settings import Settings


class PluginSettings(Settings):
    memory_grpc: str
    """``host:port`` of memory's gRPC, for the tool knowledge_search and those of memories."""
