"""Settings of the channel service."""

from infra.service.settings import Settings


class ChannelSettings(Settings):
    agent_url: str
    """The internal base URL of the agent service."""
