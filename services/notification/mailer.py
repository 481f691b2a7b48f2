"""Sends one e-mail to one recipient by SMTP."""

from __future__ import annotations

from email.message import EmailMessage
from email.utils import format_datetime
from urllib.parse import unquote, urlsplit

import aiosmtplib
import idna
from opentelemetry.trace import SpanKind

from infra.errors import EffectFailed, Transient, Unanswered
from infra.observe import telemetry
from services.notification.domain import refusal_text
from services.notification.notifications import Email

TIMEOUT_SECONDS = 30.0


class RecipientBusy(Transient):
    """The mail server refuses an e-mail to this recipient for now. Others may get it."""


class Mailer:
    """Sends by the mail server at `url` (``smtp://user:password@host:port``), from the address `sender`."""

    def __init__(self, url: str, sender: str) -> None:
        self._url = urlsplit(url)
        self._sender = sender
        self._domain = sender.rpartition("@")[2]

    async def send(self, key: str, to: str, email: Email) -> None:
        """Sends one e-mail. Its Message-ID is made from `key`, so that mailboxes recognise a copy.

        Raises EffectFailed if the server refuses it permanently, RecipientBusy if it refuses it for now, Transient if
        it takes no e-mails or cannot be reached, Unanswered if it may have accepted it.
        """
        to = _routable(to)
        message = EmailMessage()
        message["From"] = self._sender
        message["To"] = to
        message["Subject"] = email.subject
        message["Date"] = format_datetime(email.at)
        message["Message-ID"] = f"<{key}@{self._domain}>"
        # RFC 3834: suppresses out-of-office replies.
        message["Auto-Submitted"] = "auto-generated"
        # SMTP does not allow NUL.
        message.set_content(email.text.replace("\x00", ""))
        if file := email.attachment:
            main, _, sub = file.media_type.partition("/")
            message.add_attachment(file.content, maintype=main, subtype=sub, filename=file.name)
        host = self._url.hostname or ""
        attributes: dict[str, telemetry.Value] = {"server.address": host}
        with telemetry.span("send e-mail", SpanKind.CLIENT, attributes=attributes):
            try:
                await aiosmtplib.send(
                    message,
                    # Otherwise the library reads both from the headers.
                    sender=self._sender,
                    recipients=[to],
                    hostname=host,
                    port=self._url.port or (465 if self._url.scheme == "smtps" else 25),
                    username=unquote(self._url.username) if self._url.username else None,
                    password=unquote(self._url.password) if self._url.password else None,
                    use_tls=self._url.scheme == "smtps",
                    # A password is not sent in the clear, also if a host on the way hides that the server knows TLS.
                    start_tls=True if self._url.password and self._url.scheme == "smtp" else None,
                    # The name in our greeting. Without it the library would make a DNS lookup.
                    local_hostname=self._domain,
                    timeout=TIMEOUT_SECONDS,
                )
            except (aiosmtplib.SMTPException, OSError) as error:
                # Without the cause, because its text contains the address.
                raise _error(error) from None


def _routable(address: str) -> str:
    """The address with its domain in the form of DNS (RFC 5891), which every mail server takes. Raises EffectFailed."""
    name, _, domain = address.rpartition("@")
    if domain.isascii():
        return address
    try:
        return f"{name}@{idna.encode(domain, uts46=True).decode()}"
    except idna.IDNAError:
        raise EffectFailed("the domain of the address cannot exist") from None


def _error(error: Exception) -> Exception:
    if isinstance(error, aiosmtplib.SMTPRecipientsRefused):
        return _error(error.recipients[0])
    if isinstance(error, (aiosmtplib.SMTPRecipientRefused, aiosmtplib.SMTPDataError)):
        reason = refusal_text(error.code, error.message)
        return EffectFailed(reason) if 500 <= error.code < 600 else RecipientBusy(reason)
    if isinstance(error, aiosmtplib.SMTPNotSupported):
        return EffectFailed("the mail server does not support this form of address")
    if isinstance(error, aiosmtplib.SMTPResponseException):
        # An error of the greeting, the login or the sender concerns every e-mail. An operator must correct it.
        return Transient(refusal_text(error.code, error.message))
    if isinstance(error, (aiosmtplib.SMTPReadTimeoutError, aiosmtplib.SMTPServerDisconnected)):
        return Unanswered(f"mail server: {type(error).__name__}")
    if type(error) is aiosmtplib.SMTPException:
        # An extension that the server lacks, such as STARTTLS or AUTH.
        return Transient(f"mail server: {error}")
    return Transient(f"mail server: {type(error).__name__}")
