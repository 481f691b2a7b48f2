"""Settings that the agent reads from the environment."""

from pydantic import SecretStr

from infra.service.settings import Settings, StoreUrl


class AgentSettings(Settings):
    memory_grpc: str
    billing_grpc: str
    plugin_grpc: str
    s3_endpoint: StoreUrl | None = None
    """The store of images that people send. Without it models are not shown them."""
    s3_access_key: str = ""
    s3_secret_key: SecretStr = SecretStr("")
