"""Adapter for Twilio SMS: https://www.twilio.com/docs/usage/security and https://www.twilio.com/docs/messaging/api"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, ClassVar
from urllib.parse import parse_qs, parse_qsl, urlencode, urljoin

import msgspec

from infra.errors import EffectFailed, InvalidMessage, RetryLater, Unauthenticated
from infra.lanes.effects import Kind
from infra.outgoing.client import Outgoing
from services.channel.events import Attachment
from services.channel.vendors.base import (
    DEFAULT_RETRY,
    AccountRefused,
    Limit,
    Outbound,
    Request,
    Vendor,
    at_origin,
    constant_time_equals,
    described,
    download,
    forwarded,
    kind_of,
    placeholder,
    raise_for_transient,
    read_json,
)
from services.channel.vendors.items import Ignored, Inbound, Receipt, Received
from services.channel.vendors.markdown import PLAIN, render
from services.channel.vendors.splitting import split

# Characters.
MAX_TEXT = 1_600
# Files of one message.
MAX_MEDIA = 10
# By these words a person can only opt in. YES, by which a person opts in too, may answer a question of the bot.
_OPT_IN = ("START", "UNSTOP")
# By the parameter of the webhook. Empty: it is read; else why it is ignored.
# https://www.twilio.com/docs/messaging/guides/webhook-request
KINDS: Mapping[str, str] = {
    "Body": "",
    "MediaUrl": "",
    "Latitude": "",
    "ButtonText": "",
    "ButtonPayload": "",
    "ListTitle": "",
    "ListId": "",
    "InteractiveData": "",
    "FlowData": "",
    "ReferralBody": "",
    "Forwarded": "",
    "FrequentlyForwarded": "",
    "OptOutType": "Twilio answers STOP, START and HELP itself",
    "MessageStatus.delivered": "",
    "MessageStatus.read": "",
    "MessageStatus.undelivered": "",
    "MessageStatus.failed": "",
    "MessageStatus.queued": "the answer to the send tells it",
    "MessageStatus.sending": "the answer to the send tells it",
    "MessageStatus.sent": "the answer to the send tells it",
    "bodySHA256": "not a message",
}
# https://www.twilio.com/docs/api/errors: authentication, a suspended account, a number or a messaging service that is
# not the account's, cannot send, or has no number.
_ACCOUNT = frozenset((10001, 20003, 20005, 20006, 21212, 21606, 21659, 21660, 21661, 21701, 21703, 21704, 63007, 90010))
# Limits of the account and of its channel, and of the messages that wait for a number.
_LATER = frozenset((14107, 20429, 21611, 63018))


class TwilioCredentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    account_sid: Annotated[str, msgspec.Meta(pattern="^[0-9A-Za-z]{1,64}$")]
    auth_token: Annotated[str, msgspec.Meta(pattern="^[!-~]{1,256}$")]
    from_number: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    """A number such as ``+15550001``, or a messaging service (``MG…``)."""


class _Number(msgspec.Struct):
    sid: str


class _Response(msgspec.Struct):
    sid: str | None = None
    code: int = 0
    message: str = ""
    friendly_name: str = ""
    incoming_phone_numbers: list[_Number] = []


class Twilio(Vendor[TwilioCredentials]):
    """The signature covers the public URL and the parameters. Twilio accepts no idempotency key: an unanswered send
    stays unknown. Replies are sent by REST."""

    name: ClassVar[str] = "twilio"
    credentials: ClassVar[type[msgspec.Struct]] = TwilioCredentials
    kinds: ClassVar[Mapping[str, str]] = KINDS
    origin: ClassVar[str] = "https://api.twilio.com"
    addresses: ClassVar[tuple[str, ...]] = ()
    effect: ClassVar[Kind] = "once"
    receipts_asked: ClassVar[bool] = True
    steps: ClassVar[tuple[str, ...]] = (
        "Copy the account SID and the auth token, and a number or a messaging service.",
        "Enter the webhook's public URL under A message comes in, with POST.",
        "Set CLAW_PUBLIC_URL to the address that Twilio calls, because Twilio signs it.",
    )

    def receive(self, request: Request, credentials: TwilioCredentials, now: datetime) -> Received:
        try:
            text = request.body.decode()
        except UnicodeDecodeError as error:
            raise Unauthenticated("the body is not UTF-8") from error
        parameters = parse_qsl(text, keep_blank_values=True)
        if body_hash := parse_qs(request.query).get("bodySHA256"):
            # Any other body than a form is signed by its hash, which is part of the URL.
            if not constant_time_equals(body_hash[0], hashlib.sha256(request.body).hexdigest()):
                raise Unauthenticated("bodySHA256 does not match")
            parameters = []
        if not constant_time_equals(
            request.headers.get("x-twilio-signature", ""), sign(credentials, request.url, parameters)
        ):
            raise Unauthenticated("X-Twilio-Signature does not match")
        if body_hash:
            return Received([Ignored((f"body/{body_hash[0]}",), KINDS["bodySHA256"])])
        fields = dict(parameters)
        sid = fields.get("MessageSid") or fields.get("SmsSid")
        if not sid:
            raise InvalidMessage("MessageSid", "is missing")
        if "Body" not in fields or "From" not in fields:
            return Received([_status(sid, fields, credentials)])
        ids = (f"message/{sid}",)
        if fields.get("AccountSid", credentials.account_sid) != credentials.account_sid:
            return Received([Ignored(ids, "a message to another account")])
        attachments = tuple(
            Attachment(kind_of(fields.get(f"MediaContentType{n}", "")), url)
            for n in range(MAX_MEDIA)
            if (url := fields.get(f"MediaUrl{n}"))
        )
        kind = fields.get("OptOutType")
        if kind and (kind != "START" or fields["Body"].strip().upper() in _OPT_IN):
            # Twilio has answered, and takes no message to a person who has opted out.
            return Received([Ignored(ids, KINDS["OptOutType"])])
        text = _text(fields)
        if not text.strip() and not attachments and fields.get("NumMedia", "0") not in ("", "0"):
            text = placeholder("a file", fields.get("MediaContentType0", ""))
        item = Inbound(ids, fields["From"], fields["From"], sid, text, attachments=attachments)
        return Received([item])

    def split(self, text: str) -> Sequence[str]:
        return split(text, MAX_TEXT, lambda part: len(render(part, PLAIN)))

    def limits(self, conversation: str) -> Sequence[Limit]:
        """A long code sends one segment in a second: https://www.twilio.com/docs/messaging/guides/rate-limits"""
        return [Limit("number", 1, 1)]

    async def fetch(
        self, outgoing: Outgoing, origin: str, credentials: TwilioCredentials, ref: str, most: int
    ) -> bytes:
        url = at_origin(self, origin, ref, "twilio.com")
        answer = await outgoing.request(
            "GET", url, headers={"authorization": basic(credentials)}, max_bytes=most, timeout=120.0
        )
        if answer.status in (301, 302, 303, 307, 308) and (target := answer.headers.get("location")):
            # The content lies on a server that gets no password.
            return await download(outgoing, urljoin(url, target), most)
        raise_for_transient(answer)
        if answer.status != 200:
            raise EffectFailed(f"HTTP {answer.status}")
        return answer.body

    async def identify(self, outgoing: Outgoing, origin: str, credentials: TwilioCredentials) -> str:
        return (await _call(outgoing, origin, credentials, "GET", ".json")).friendly_name

    async def register(self, outgoing: Outgoing, origin: str, credentials: TwilioCredentials, url: str) -> bool:
        """Only for a number of the account. The address of a messaging service is set in the console."""
        if credentials.from_number.startswith("MG"):
            return False
        query = urlencode({"PhoneNumber": credentials.from_number})
        found = await _call(outgoing, origin, credentials, "GET", f"/IncomingPhoneNumbers.json?{query}")
        if not found.incoming_phone_numbers:
            raise EffectFailed("from_number is not a number of this account")
        path = f"/IncomingPhoneNumbers/{found.incoming_phone_numbers[0].sid}.json"
        await _call(outgoing, origin, credentials, "POST", path, {"SmsUrl": url, "SmsMethod": "POST"})
        return True

    async def send(
        self, outgoing: Outgoing, origin: str, credentials: TwilioCredentials, message: Outbound
    ) -> str | None:
        sender = "MessagingServiceSid" if credentials.from_number.startswith("MG") else "From"
        form = {"To": message.conversation, sender: credentials.from_number, "Body": render(message.text, PLAIN)}
        if message.webhook:
            form["StatusCallback"] = message.webhook
        return (await _call(outgoing, origin, credentials, "POST", "/Messages.json", form)).sid


def _text(fields: Mapping[str, str]) -> str:
    """The text, a choice, the place or the form of a message. Those come with WhatsApp and RCS only."""
    parts = [fields["Body"] or fields.get("ButtonText", "") or fields.get("ListTitle", "")]
    if not parts[0]:
        parts = [fields.get("ButtonPayload", "") or fields.get("ListId", "")]
    if "Latitude" in fields:
        parts.append(
            described("Location", *(fields.get(name) for name in ("Label", "Address", "Latitude", "Longitude")))
        )
    parts += [fields.get("InteractiveData", ""), fields.get("FlowData", "")]
    if any(parts) and "true" in (fields.get("Forwarded"), fields.get("FrequentlyForwarded")):
        # It may be of another person, whose yes approves nothing.
        parts = [forwarded("\n".join(filter(None, parts)))]
    if any(fields.get(name) for name in ("ReferralHeadline", "ReferralBody")):
        parts.append(described("From the advertisement", fields.get("ReferralHeadline"), fields.get("ReferralBody")))
    return "\n".join(filter(None, parts))


def _status(sid: str, fields: Mapping[str, str], credentials: TwilioCredentials) -> Receipt | Ignored:
    """https://www.twilio.com/docs/messaging/guides/outbound-message-status-in-status-callbacks"""
    state = fields.get("MessageStatus", "")[:40]
    ids = (f"status/{sid}/{state}",)
    if fields.get("AccountSid", credentials.account_sid) != credentials.account_sid:
        return Ignored(ids, "a status of another account")
    match state:
        case "delivered" | "read":
            return Receipt(ids, sid, state)
        case "undelivered" | "failed":
            return Receipt(ids, sid, "failed", f"{fields.get('ErrorCode', '')[:20]}: {state}".replace("\0", ""))
    return Ignored(ids, KINDS.get(f"MessageStatus.{state}") or f"a status {state}")


async def _call(
    outgoing: Outgoing,
    origin: str,
    credentials: TwilioCredentials,
    method: str,
    path: str,
    form: dict[str, str] | None = None,
) -> _Response:
    """`path` within the account."""
    headers = {"authorization": basic(credentials)}
    if form is not None:
        headers["content-type"] = "application/x-www-form-urlencoded"
    answer = await outgoing.request(
        method,
        f"{origin}/2010-04-01/Accounts/{credentials.account_sid}{path}",
        headers=headers,
        content=None if form is None else urlencode(form).encode(),
        template=f"/2010-04-01/Accounts/{{account_sid}}{path.partition('?')[0]}",
    )
    response = read_json(answer, _Response)
    if answer.status == 401 or response.code in _ACCOUNT:
        raise AccountRefused(f"{response.code or answer.status}: {response.message}"[:200])
    if response.code in _LATER:
        raise RetryLater(DEFAULT_RETRY, f"{response.code}: {response.message}"[:200])
    if answer.status >= 400:
        raise EffectFailed(f"{response.code}: {response.message}"[:200])
    return response


def basic(credentials: TwilioCredentials) -> str:
    login = f"{credentials.account_sid}:{credentials.auth_token}"
    return f"Basic {base64.b64encode(login.encode()).decode()}"


def sign(credentials: TwilioCredentials, url: str, parameters: Sequence[tuple[str, str]]) -> str:
    # A name that comes twice counts with each of its different values, in order.
    signed = url + "".join(name + value for name, value in sorted(set(parameters)))
    return base64.b64encode(hmac.digest(credentials.auth_token.encode(), signed.encode(), hashlib.sha1)).decode()
