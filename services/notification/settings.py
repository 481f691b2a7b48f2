"""The settings of notification, read from the environment."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, SecretStr

from infra.service.settings import Settings
from services.notification.domain import is_address


def _smtp_url(value: SecretStr) -> SecretStr:
    try:
        url = urlsplit(value.get_secret_value())
        usable = url.scheme in ("smtp", "smtps") and bool(url.hostname) and url.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("must be a URL such as smtp://host:port or smtps://user:password@host:port")
    return value


def _address(value: str) -> str:
    if not is_address(value):
        raise ValueError("must be an e-mail address")
    return value


class NotificationSettings(Settings):
    user_grpc: str
    """``host:port`` of the user service, which knows the addresses of a tenant's owners."""
    smtp_url: Annotated[SecretStr, AfterValidator(_smtp_url)]
    """``smtp://``, which uses STARTTLS if the server offers it, or ``smtps://``; with user and password. A password is
    not sent without TLS."""
    mail_from: Annotated[str, AfterValidator(_address)] = "clawbus@localhost.localdomain"
