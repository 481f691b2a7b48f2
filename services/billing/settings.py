"""Settings of billing, read from the environment."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, SecretStr, model_validator

from infra.service.settings import Settings
from protos.catalog import USAGE_RECORDS
from services.billing.invoices.countries import COUNTRIES
from services.billing.invoices.tax import MAX_ADDRESS_LINES, Seller


def _targets(value: str) -> str:
    """Raises ValueError if a service that produces usage has no address."""
    found = addresses(value)
    if missing := [name for name in USAGE_RECORDS.producers if name not in found]:
        raise ValueError(f"the address of {', '.join(missing)} is missing; expected name=host:port,name=host:port")
    return value


def addresses(value: str) -> dict[str, str]:
    """Returns service → ``host:port``."""
    return {name.strip(): target.strip() for name, _, target in (part.partition("=") for part in value.split(","))}


class BillingSettings(Settings):
    operations: Annotated[str, AfterValidator(_targets)]
    """Addresses of the services' operations gRPC: ``user=host:port,agent=host:port,…``."""
    stripe_api_key: SecretStr | None = None
    """Without it no payment provider is set up."""
    stripe_webhook_secret: SecretStr | None = None
    stripe_api_base: str = "https://api.stripe.com"
    seller_country: str = ""
    """The country of the company that sends the invoices (ISO 3166). Decides about reverse charge."""
    seller_name: str = ""
    """With `seller_vat_id` and `seller_country` it stands in e-invoices; without them there are none."""
    seller_vat_id: str = ""
    seller_address: str = ""
    """At most three lines, separated by semicolons, without the name and the country."""

    @property
    def seller(self) -> Seller:
        address = "\n".join(line.strip() for line in self.seller_address.split(";"))
        return Seller(name=self.seller_name, country=self.seller_country, vat_id=self.seller_vat_id, address=address)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.seller_country and self.seller_country not in COUNTRIES:
            raise ValueError("CLAW_SELLER_COUNTRY is not a country of ISO 3166")
        if len(self.seller_address.split(";")) > MAX_ADDRESS_LINES:
            raise ValueError(f"CLAW_SELLER_ADDRESS must have at most {MAX_ADDRESS_LINES} lines")
        if (self.stripe_api_key is None) != (self.stripe_webhook_secret is None):
            raise ValueError("CLAW_STRIPE_API_KEY and CLAW_STRIPE_WEBHOOK_SECRET must be set together")
        return self
