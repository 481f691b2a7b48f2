"""Examples of WhatsApp, LINE, Twilio, QQ and the webhook type."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import msgspec

from services.channel.vendors.base import Request, placeholder
from services.channel.vendors.items import Deleted, Edited, Moved, Reacted, Receipt
from tests.services.channel.vendors.kinds import URL, Examples, Expected, ignored, posted
from tooling.testing.vendors import (
    LineStandIn,
    QQStandIn,
    TwilioStandIn,
    WebhookStandIn,
    WhatsAppStandIn,
)
from tooling.testing.vendors.server import encoded


def whatsapp() -> Examples:
    fake = WhatsAppStandIn()

    def of(type_: str, **fields: Any) -> Any:
        return fake.call(fake.message(None, type=type_, **fields))

    def change(field: str) -> Any:
        entry = {"id": "WABA", "changes": [{"field": field, "value": {"event": "x"}}]}
        return fake.signed(encoded({"object": "whatsapp_business_account", "entry": [entry]}))

    form = {"body": "Sent", "name": "flow", "response_json": '{"flow_token":"t","day":"Monday","guests":2}'}
    contact = {
        "name": {"formatted_name": "Ada L"},
        "phones": [{"phone": "+491"}, {"phone": None}],
        "emails": [{"email": "a@e.example"}],
    }
    order = {
        "catalog_id": "c",
        "text": "by Friday",
        "product_items": [{"product_retailer_id": "sku-1", "quantity": 2, "item_price": 9.5, "currency": "EUR"}],
    }
    unsupported = placeholder("a message that WhatsApp does not pass on")
    given: dict[str, tuple[Any, Expected]] = {
        "text": (fake.call(fake.message("hi")), "hi"),
        **{name: (of(name, **{name: {"id": "m1", "mime_type": "x/y"}}), "") for name in ("image", "video", "audio")},
        "document": (of("document", document={"id": "m1", "filename": "a.pdf", "caption": "read it"}), "read it"),
        "sticker": (of("sticker", sticker={"id": "m1", "mime_type": "image/webp"}), ""),
        "location": (
            of("location", location={"latitude": 52.5, "longitude": 13.4, "name": "Café"}),
            "[Location: Café, 52.5, 13.4]",
        ),
        "contacts": (of("contacts", contacts=[contact]), "[Contact: Ada L, +491, a@e.example]"),
        "button": (of("button", button={"text": "Yes", "payload": "y"}), "Yes"),
        "interactive.button_reply": (of("interactive", interactive={"button_reply": {"title": "No"}}), "No"),
        "interactive.list_reply": (of("interactive", interactive={"list_reply": {"title": "B"}}), "B"),
        "interactive.nfm_reply": (
            of("interactive", interactive={"type": "nfm_reply", "nfm_reply": form}),
            "[Form: Sent]\nday: Monday\nguests: 2",
        ),
        "interactive.call_permission_reply": (
            of("interactive", interactive={"call_permission_reply": {"response": "accept"}}),
            "[Permission to call: accept]",
        ),
        "order": (of("order", order=order), "[Order: by Friday]\n- 2 × sku-1 (9.5 EUR)"),
        "reaction": (of("reaction", reaction={"message_id": "wamid.1", "emoji": "👍"}), Reacted),
        "edit": (
            of("edit", edit={"original_message_id": "wamid.1", "message": {"type": "text", "text": {"body": "new"}}}),
            Edited,
        ),
        "revoke": (of("revoke", revoke={"original_message_id": "wamid.1"}), Deleted),
        "system.user_changed_number": (of("system", system={"type": "user_changed_number", "wa_id": "492"}), Moved),
        "system.user_changed_user_id": (
            of("system", system={"type": "user_changed_user_id", "previous_user_id": "US.1", "user_id": "US.2"}),
            Moved,
        ),
        "system.customer_identity_changed": (of("system", system={"type": "customer_identity_changed"}), None),
        "request_welcome": (of("request_welcome"), None),
        "unsupported": (of("unsupported", errors=[{"code": 131051}]), unsupported),
        **{
            f"status.{state}": (
                fake.call(statuses=[{"id": "wamid.1", "status": state}]),
                Receipt if state != "sent" else None,
            )
            for state in ("sent", "delivered", "read", "failed")
        },
        "change.messages": (fake.call(fake.message("hi")), "hi"),
    }
    given |= {kind: (change(kind[7:]), None) for kind in ignored("whatsapp") if kind.startswith("change.")}
    bodies = {kind: (msgspec.json.decode(call[0]), expected) for kind, (call, expected) in given.items()}
    return Examples(fake, lambda body: posted(fake.signed(encoded(body))), bodies)


def line() -> Examples:
    fake = LineStandIn()

    def of(type_: str, **fields: Any) -> Any:
        return fake.event(message={"type": type_, "id": "7", **fields})

    sticker: dict[str, Any] = {"packageId": "1", "stickerId": "2", "quoteToken": "q", "stickerResourceType": "STATIC"}
    sticker |= {"keywords": ["hello", "wave"]}
    by_line = {"contentProvider": {"type": "line"}}
    files: dict[str, dict[str, Any]] = {
        "image": by_line | {"quoteToken": "q"},
        "video": by_line | {"quoteToken": "q", "duration": 1_000},
        "audio": by_line | {"duration": 1_000},
        "file": {"fileName": "a.pdf", "fileSize": 7},
    }
    place = {"title": "Café", "address": "Main St. 1", "latitude": 52.5, "longitude": 13.4}
    given: dict[str, tuple[Any, Expected]] = {
        "text": (fake.event("hi"), "hi"),
        **{name: (of(name, **about), "") for name, about in files.items()},
        "location": (of("location", **place), "[Location: Café, Main St. 1, 52.5, 13.4]"),
        "sticker": (of("sticker", **sticker), "[Sticker: hello, wave]"),
        "event.message": (fake.event("hi"), "hi"),
        "event.messageEdited": (fake.event("hi", type="messageEdited"), Edited),
        "event.postback": (
            fake.event(type="postback", postback={"data": "day", "params": {"date": "2026-12-24"}}),
            "day 2026-12-24",
        ),
        "event.unsend": (fake.event(type="unsend", unsend={"messageId": "7"}), Deleted),
    }
    for kind in ignored("line"):
        event = fake.event(type=kind.removeprefix("event."))
        del event["message"]
        given[kind] = event, None
    bodies = {kind: ({"destination": "Ub0", "events": [event]}, expected) for kind, (event, expected) in given.items()}
    return Examples(fake, lambda body: posted(fake.signed(encoded(body))), bodies)


def twilio() -> Examples:
    fake = TwilioStandIn()
    message = {"MessageSid": "SM1", "AccountSid": fake.sid, "From": "+4915550002", "To": fake.number, "NumMedia": "0"}

    def of(text: str = "", **fields: str) -> Any:
        return message | {"Body": text} | fields

    def request(content: Any) -> Request:
        """A form, or any other body, which is signed by its hash."""
        if isinstance(content, bytes):
            url = f"{URL}?bodySHA256={hashlib.sha256(content).hexdigest()}"
            return Request("POST", url.partition("?")[2], fake.signed(url, {})[1], content, url)
        fields = content if isinstance(content, dict) else {}
        # A form has no halves of characters.
        texts = {str(name): str(value).encode(errors="replace").decode() for name, value in fields.items()}
        return posted(fake.signed(URL, texts))

    told = ("delivered", "read", "undelivered", "failed")
    given: dict[str, tuple[Any, Expected]] = {
        "Body": (of("hi"), "hi"),
        "MediaUrl": (of(NumMedia="1", MediaUrl0="https://api.twilio.com/m", MediaContentType0="image/png"), ""),
        "Latitude": (of(Latitude="52.5", Longitude="13.4", Label="Café"), "[Location: Café, 52.5, 13.4]"),
        "ButtonText": (of(ButtonText="Yes", ButtonPayload="y"), "Yes"),
        "ButtonPayload": (of(ButtonPayload="y"), "y"),
        "ListTitle": (of(ListTitle="B", ListId="b"), "B"),
        "ListId": (of(ListId="b"), "b"),
        "InteractiveData": (of(InteractiveData='{"day":"Monday"}'), '{"day":"Monday"}'),
        "FlowData": (of(FlowData='{"day":"Monday"}'), '{"day":"Monday"}'),
        "ReferralBody": (of("hi", ReferralBody="Sale"), "hi\n[From the advertisement: Sale]"),
        "Forwarded": (of("yes", Forwarded="true"), "[Forwarded message]\nyes"),
        "FrequentlyForwarded": (of("yes", FrequentlyForwarded="true"), "[Forwarded message]\nyes"),
        "OptOutType": (of("STOP", OptOutType="STOP"), None),
        "bodySHA256": (b'{"a":1}', None),
        **{
            f"MessageStatus.{state}": (
                {"MessageSid": "SM1", "AccountSid": fake.sid, "MessageStatus": state},
                Receipt if state in told else None,
            )
            for state in (*told, "queued", "sending", "sent")
        },
    }
    return Examples(fake, request, given)


def qq() -> Examples:
    fake = QQStandIn()
    face = base64.b64encode(b'{"text":"/smile"}').decode()

    def event(kind: str, **fields: Any) -> Any:
        return {"id": "e1", "op": 0, "t": kind, "d": fields}

    guild = {
        "id": "m1",
        "author": {"id": "7", "bot": False},
        "content": "<@!99> hi",
        "channel_id": "c1",
        "guild_id": "g1",
    }
    press = {"id": "i1", "group_openid": "g", "group_member_openid": "u", "data": {"resolved": {"button_data": "yes"}}}
    given: dict[str, tuple[Any, Expected]] = {
        "C2C_MESSAGE_CREATE": (fake.event(f'hi <faceType=1,faceId="13",ext="{face}">'), "hi [Emoji: /smile]"),
        "GROUP_AT_MESSAGE_CREATE": (fake.event(" hi", group="g"), "hi"),
        "GROUP_MESSAGE_CREATE": (fake.event("hi", group="g") | {"t": "GROUP_MESSAGE_CREATE"}, "hi"),
        "AT_MESSAGE_CREATE": (event("AT_MESSAGE_CREATE", **guild), "hi"),
        "DIRECT_MESSAGE_CREATE": (event("DIRECT_MESSAGE_CREATE", **guild), "hi"),
        "INTERACTION_CREATE": (event("INTERACTION_CREATE", **press), "yes"),
    }
    given |= {kind: (event(kind), None) for kind in ignored("qq")}
    return Examples(fake, lambda content: posted(fake.signed(content)), given)


def webhook() -> Examples:
    fake = WebhookStandIn()
    given: dict[str, tuple[Any, Expected]] = {
        "text": ({"conversation_id": "c", "user_id": "u", "text": "hi"}, "hi"),
        "attachments": ({"conversation_id": "c", "user_id": "u", "attachments": [{"url": "https://e.example/a"}]}, ""),
    }
    return Examples(fake, lambda content: posted(fake.signed(content)), given)
