"""What the channel service reads from the environment."""

from infra.service.settings import Settings


class ChannelSettings(Settings):
    agent_url: str
    """The agent's base URL, inside."""
