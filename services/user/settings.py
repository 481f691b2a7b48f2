"""The settings of the user service, read from the environment."""

from pydantic import Field, SecretStr

from infra.service.settings import Settings


class UserSettings(Settings):
    admin_token: SecretStr = Field(min_length=24)
    """The token of the platform's operator, who creates tenants."""
