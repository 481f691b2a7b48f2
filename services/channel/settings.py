"""Settings of the channel service."""

from infra.service.settings import Settings


class ChannelSettings(Settings):
    agent_url: str
    """The internal base URL of the agent service."""
    public_url: str = "http://127.0.0.1:8080"
    """The base URL under which vendors call the webhooks. Twilio signs it."""
