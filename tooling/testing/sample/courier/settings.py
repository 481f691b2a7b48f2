"""What the courier reads from the environment."""

from infra.service.settings import Settings


class CourierSettings(Settings):
    office_url: str
