"""Settings of the channel service."""

from pydantic import SecretStr

from infra.service.settings import Settings, StoreUrl


class ChannelSettings(Settings):
    memory_grpc: str
    """host:port. Memory reads the PDF and Office files that people send."""
    agent_url: str
    """The internal base URL of the agent service."""
    public_url: str = "http://127.0.0.1:8080"
    """The base URL under which vendors call the webhooks. Twilio signs it."""
    s3_endpoint: StoreUrl
    s3_access_key: str
    s3_secret_key: SecretStr
    transcription_base_url: str | None = None
    """URL of an OpenAI-shaped endpoint (ends in ``/v1``) for voice messages. Without it they are not read."""
    transcription_model: str = "whisper-1"
    transcription_api_key: SecretStr | None = None
