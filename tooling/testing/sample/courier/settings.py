"""Settings of the courier."""

from infra.service.settings import Settings


class CourierSettings(Settings):
    office_url: str
