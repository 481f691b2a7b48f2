"""What the user service reads from the environment."""

from pydantic import Field, SecretStr

from infra.service.settings import Settings


class UserSettings(Settings):
    admin_token: SecretStr = Field(min_length=24)
    """The operator's of the platform: makes tenants."""
