"""WhatsApp's webhooks: https://developers.facebook.com/docs/whatsapp/cloud-api/webhooks/components"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

from services.channel.events import Attachment
from services.channel.vendors.base import (
    AccountRefused,
    Batch,
    UnreadableCall,
    decode,
    described,
    forwarded,
    from_json,
    kind_of,
    placeholder,
)
from services.channel.vendors.items import Deleted, Edited, Ignored, Inbound, Item, Moved, Reacted, Receipt

# The errors of a message that are about the account.
# https://developers.facebook.com/docs/whatsapp/cloud-api/support/error-codes
ACCOUNT = frozenset((3, 10, 33, 190, 368, 131005, 131031, 131037, 131042, 131045, 133010))
_ABOUT_THE_ACCOUNT = "a notice about the account"
_NOT_OFFERED = "the bot does not offer it"

# By the type of the message or the name of a status, then by the field of the change. Empty: it is read; else why it
# is ignored.
KINDS: Mapping[str, str] = {
    "text": "",
    "image": "",
    "video": "",
    "audio": "",
    "document": "",
    "sticker": "",
    "location": "",
    "contacts": "",
    "button": "",
    "interactive.button_reply": "",
    "interactive.list_reply": "",
    "interactive.nfm_reply": "",
    "interactive.call_permission_reply": "",
    "order": "",
    "reaction": "",
    "edit": "",
    "revoke": "",
    "system.user_changed_number": "",
    "system.user_changed_user_id": "",
    "system.customer_identity_changed": _ABOUT_THE_ACCOUNT,
    "request_welcome": "a chat was opened, without a message",
    "unsupported": "",
    "status.sent": "the answer to the send tells it",
    "status.delivered": "",
    "status.read": "",
    "status.failed": "",
    "change.messages": "",
    "change.message_echoes": "a message that the business wrote",
    "change.smb_message_echoes": "a message that the business wrote",
    "change.history": "messages of the time before",
    "change.calls": _NOT_OFFERED,
    "change.flows": _ABOUT_THE_ACCOUNT,
    "change.smb_app_state_sync": _ABOUT_THE_ACCOUNT,
    "change.user_preferences": "it names no message",
    "change.account_alerts": _ABOUT_THE_ACCOUNT,
    "change.account_review_update": _ABOUT_THE_ACCOUNT,
    "change.account_update": _ABOUT_THE_ACCOUNT,
    "change.business_capability_update": _ABOUT_THE_ACCOUNT,
    "change.message_template_components_update": _ABOUT_THE_ACCOUNT,
    "change.message_template_quality_update": _ABOUT_THE_ACCOUNT,
    "change.message_template_status_update": _ABOUT_THE_ACCOUNT,
    "change.template_category_update": _ABOUT_THE_ACCOUNT,
    "change.phone_number_name_update": _ABOUT_THE_ACCOUNT,
    "change.phone_number_quality_update": _ABOUT_THE_ACCOUNT,
    "change.partner_solutions": _ABOUT_THE_ACCOUNT,
    "change.payment_configuration_update": _ABOUT_THE_ACCOUNT,
    "change.security": _ABOUT_THE_ACCOUNT,
}
_FILES: dict[str, Literal["image", "voice", "video"]] = {
    "image": "image",
    "sticker": "image",
    "audio": "voice",
    "video": "video",
}


# The types of messages with words or files of a person.
_SPOKEN = frozenset(
    (*_FILES, "text", "document", "location", "contacts", "button", "interactive", "order", "unsupported", "unknown")
)
_MENTION = re.compile(r"(?<!\S)@(\S+)")


class _Text(msgspec.Struct):
    body: str = ""


class _Media(msgspec.Struct):
    id: str = ""
    caption: str | None = None
    filename: str | None = None
    mime_type: str = ""


class _Choice(msgspec.Struct):
    title: str = ""
    body: str = ""
    response_json: str = ""
    """Of a flow: its fields and values."""
    response: str = ""


class _Interactive(msgspec.Struct):
    type: str = ""
    button_reply: _Choice | None = None
    list_reply: _Choice | None = None
    nfm_reply: _Choice | None = None
    """The form of a flow, or an address, was filled in."""
    call_permission_reply: _Choice | None = None


class _Location(msgspec.Struct):
    latitude: float
    longitude: float
    name: str = ""
    address: str = ""


class _Name(msgspec.Struct):
    formatted_name: str | None = None


class _Phone(msgspec.Struct):
    phone: str | None = None


class _Email(msgspec.Struct):
    email: str | None = None


class _Company(msgspec.Struct):
    company: str | None = None


class _Contact(msgspec.Struct):
    name: _Name = msgspec.field(default_factory=_Name)
    phones: list[_Phone] | None = None
    emails: list[_Email] | None = None
    org: _Company | None = None


class _Product(msgspec.Struct):
    product_retailer_id: str = ""
    quantity: str | int | float = 1
    item_price: str | int | float = ""
    currency: str = ""


class _Order(msgspec.Struct):
    text: str = ""
    product_items: list[_Product] = []


class _System(msgspec.Struct):
    type: str = ""
    wa_id: str = ""
    """The new number."""
    user_id: str = ""
    previous_user_id: str = ""


class _Referred(msgspec.Struct):
    product_retailer_id: str = ""


class _Context(msgspec.Struct):
    from_: str = msgspec.field(name="from", default="")
    """Who has written the message that this one answers."""
    referred_product: _Referred | None = None
    forwarded: bool | None = None
    frequently_forwarded: bool | None = None


class _Referral(msgspec.Struct):
    """The advertisement or the post from which the person came."""

    headline: str = ""
    body: str = ""


class _Button(msgspec.Struct):
    text: str = ""


class _Reaction(msgspec.Struct):
    message_id: str
    emoji: str = ""
    """Empty: the person took the sign back. Each person has one at most."""


class _Changed(msgspec.Struct):
    """An edit or a deletion."""

    original_message_id: str
    message: dict[str, Any] = {}


class _Message(msgspec.Struct):
    id: str
    type: str
    from_: str = msgspec.field(name="from", default="")
    """The number; empty if the person has a name and keeps the number to itself."""
    from_user_id: str = ""
    """The id of a person for this business. A message without a number comes with it."""
    group_id: str = ""
    timestamp: str = ""
    """Unix seconds, in decimal digits."""
    text: _Text | None = None
    image: _Media | None = None
    video: _Media | None = None
    audio: _Media | None = None
    document: _Media | None = None
    sticker: _Media | None = None
    location: _Location | None = None
    contacts: list[_Contact] | None = None
    button: _Button | None = None
    interactive: _Interactive | None = None
    order: _Order | None = None
    system: _System | None = None
    reaction: _Reaction | None = None
    edit: _Changed | None = None
    revoke: _Changed | None = None
    context: _Context | None = None
    referral: _Referral | None = None

    @property
    def person(self) -> str:
        if not self.from_ and not self.from_user_id:
            raise UnreadableCall("from: is missing")
        return self.from_ or self.from_user_id

    @property
    def media(self) -> _Media | None:
        return self.image or self.video or self.audio or self.document or self.sticker

    @property
    def order_of_change(self) -> int:
        if not (self.timestamp.isascii() and self.timestamp.isdecimal() and len(self.timestamp) <= 12):
            raise UnreadableCall("timestamp: is not a time")
        return int(self.timestamp)


class _Problem(msgspec.Struct):
    code: int = 0
    title: str = ""


class _Status(msgspec.Struct):
    id: str
    status: str = ""
    errors: list[_Problem] | None = None


class _Metadata(msgspec.Struct):
    phone_number_id: str = ""
    display_phone_number: str = ""


class _Value(msgspec.Struct):
    metadata: _Metadata | None = None
    messages: list[msgspec.Raw] | None = None
    statuses: list[msgspec.Raw] | None = None


class _Change(msgspec.Struct):
    field: str
    value: msgspec.Raw = msgspec.Raw(b"{}")


class _Entry(msgspec.Struct):
    changes: list[msgspec.Raw] | None = None


class _Webhook(msgspec.Struct):
    entry: list[msgspec.Raw] | None = None


def read(body: bytes, number: str) -> list[Item]:
    """The items of all changes. `number`: the id of the channel's number."""
    batch = Batch()
    return [*batch.of_each(decode(body, _Webhook).entry or (), lambda entry: _of_entry(batch, entry, number))]


def _of_entry(batch: Batch, entry: msgspec.Raw, number: str) -> Iterator[Item]:
    changes = decode(entry, _Entry).changes or ()
    return batch.of_each(changes, lambda change: _of_change(batch, decode(change, _Change), number))


def _of_change(batch: Batch, change: _Change, number: str) -> Iterator[Item]:
    if change.field != "messages":
        ids = (f"change/{hashlib.sha256(bytes(change.value)).hexdigest()}",)
        yield Ignored(ids, KINDS.get(f"change.{change.field}") or f"a change of {change.field[:40]}")
        return
    value = decode(change.value, _Value)
    metadata = value.metadata or _Metadata()
    own = metadata.display_phone_number if metadata.phone_number_id == number else None
    yield from batch.of_each(value.statuses or (), lambda status: [_status(decode(status, _Status))])
    yield from batch.of_each(value.messages or (), lambda message: [_message(decode(message, _Message), own)])


def _message(message: _Message, own: str | None) -> Item:
    """own: the channel's number; None: the message was written to another one."""
    return Ignored((f"message/{message.id}",), "a message to another number") if own is None else _item(message, own)


def _item(message: _Message, own: str) -> Item:
    ids = (f"message/{message.id}",)
    if message.reaction:
        return _reacted(ids, message, message.reaction)
    if message.revoke:
        return Deleted(ids, f"message/{message.revoke.original_message_id}")
    if message.edit:
        return _edited(ids, message, message.edit, own)
    if message.system:
        # The person's new number, or else the new id for this business.
        if message.system.type == "user_changed_number" and message.system.wa_id:
            return Moved(ids, message.from_ or message.system.previous_user_id, message.system.wa_id, True)
        if message.system.type == "user_changed_user_id" and message.system.previous_user_id:
            return Moved(ids, message.system.previous_user_id, message.system.user_id, True)
        return Ignored(ids, KINDS["system.customer_identity_changed"])
    text = _text(message)
    if text is None:
        return Ignored(ids, KINDS.get(message.type) or f"a message of type {message.type[:40]}")
    return Inbound(
        ids,
        message.group_id or message.person,
        message.person,
        message.id,
        text,
        attachments=_attachments(message),
        in_group=bool(message.group_id),
        also=message.from_user_id if message.from_ else "",
        names_others=_names_others(message, own),
        # WhatsApp does not say which files were sent together.
        in_album=bool(message.image or message.video or message.document),
    )


def _names_others(message: _Message, own: str) -> bool:
    """A mention is told in the text only."""
    names = _MENTION.findall(message.text.body) if message.text else []
    if message.context and message.context.from_:
        names.append(message.context.from_)
    return any(_digits(name) != _digits(own) for name in names)


def _digits(number: str) -> str:
    return "".join(filter(str.isdecimal, number))


def _edited(ids: tuple[str, ...], message: _Message, edit: _Changed, own: str) -> Edited | Ignored:
    # Without an edit in the edit, which could be nested without end.
    fields = edit.message | {"id": edit.original_message_id, "from": message.person, "edit": None}
    fields |= {"group_id": message.group_id}
    try:
        item = _item(from_json(msgspec.json.encode(fields), _Message), own)
    except msgspec.ValidationError as error:
        raise UnreadableCall(f"edit: {error}") from error
    if not isinstance(item, Inbound):
        return Ignored(ids, "an edit without a text")
    return Edited(ids, item.ids[0], item, message.order_of_change)


def _reacted(ids: tuple[str, ...], message: _Message, reaction: _Reaction) -> Reacted:
    signs = (reaction.emoji,) if reaction.emoji else ()
    target = f"message/{reaction.message_id}"
    return Reacted(ids, target, reaction.message_id, message.person, signs, "all", message.order_of_change)


def _status(status: _Status) -> Ignored | Receipt:
    ids = (f"status/{status.id}/{status.status}",)
    match status.status:
        case "delivered" | "read":
            return Receipt(ids, status.id, status.status)
        case "failed":
            problem = next(iter(status.errors or ()), _Problem())
            reason = f"{problem.code}: {problem.title}"[:200].replace("\0", "")
            prefix = AccountRefused.PREFIX if problem.code in ACCOUNT else ""
            return Receipt(ids, status.id, "failed", prefix + reason)
    return Ignored(ids, KINDS.get(f"status.{status.status}") or f"a status {status.status[:40]}")


def _text(message: _Message) -> str | None:
    text = _words(message)
    if text is None:
        return None
    about = []
    if text and message.context and (message.context.forwarded or message.context.frequently_forwarded):
        text = forwarded(text)
    if message.context and message.context.referred_product:
        about.append(described("About the product", message.context.referred_product.product_retailer_id))
    if message.referral:
        about.append(described("From the advertisement", message.referral.headline, message.referral.body))
    return "\n\n".join([text, *about]) if about else text


def _words(message: _Message) -> str | None:
    if message.text:
        return message.text.body
    if message.button:
        return message.button.text
    if message.interactive and (choice := _choice(message.interactive)):
        return choice
    if message.order:
        return _order(message.order)
    if message.media and (message.media.id or message.media.caption):
        return message.media.caption or ""
    if place := message.location:
        return described("Location", place.name, place.address, place.latitude, place.longitude)
    if message.contacts:
        return "\n".join(map(_contact, message.contacts))
    # WhatsApp does not give this message to programs, such as a poll, or could not read it, such as a file that is too
    # large. The person should hear that.
    return placeholder("a message that WhatsApp does not pass on") if message.type in _SPOKEN else None


def _choice(interactive: _Interactive) -> str | None:
    if chosen := interactive.button_reply or interactive.list_reply:
        return chosen.title
    if flow := interactive.nfm_reply:
        values = _values(flow.response_json)
        return "\n".join([described("Form", flow.body), *values]) if values else flow.body or flow.response_json or None
    if permission := interactive.call_permission_reply:
        return described("Permission to call", permission.response)
    return None


def _values(response: str) -> list[str]:
    """The fields of a form, a line for each. Its token is ours."""
    try:
        fields = from_json(response)
    except (msgspec.DecodeError, RecursionError):
        return []
    if not isinstance(fields, dict):
        return []
    return [
        f"{name}: {value if isinstance(value, str) else msgspec.json.encode(value).decode()}"
        for name, value in fields.items()
        if name != "flow_token"
    ]


def _order(order: _Order) -> str:
    lines = [
        f"- {product.quantity} × {product.product_retailer_id} ({product.item_price} {product.currency})"
        for product in order.product_items
    ]
    return "\n".join([described("Order", order.text), *lines])


def _contact(contact: _Contact) -> str:
    numbers = [one.phone for one in contact.phones or ()]
    addresses = [one.email for one in contact.emails or ()]
    company = contact.org and contact.org.company
    return described("Contact", contact.name.formatted_name, company, *numbers, *addresses)


def _attachments(message: _Message) -> tuple[Attachment, ...]:
    if (media := message.media) is None or not media.id:
        return ()
    kind = _FILES.get(message.type) or kind_of(media.mime_type)
    return (Attachment(kind, media.id, media.filename or ""),)
