"""Settings that the agent reads from the environment."""

from infra.service.settings import Settings as Base


class Settings(Base):
    memory_grpc: str
    billing_grpc: str
    plugin_grpc: str
