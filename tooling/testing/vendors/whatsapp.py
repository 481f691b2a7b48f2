"""A fake of graph.facebook.com, and webhooks as WhatsApp sends them.

https://developers.facebook.com/docs/whatsapp/cloud-api
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import secrets
from typing import Annotated, Literal

import msgspec

from tooling.testing.vendors.server import Call, Refused, Reply, StandIn, encoded, read_form


class _Text(msgspec.Struct, forbid_unknown_fields=True):
    body: Annotated[str, msgspec.Meta(min_length=1, max_length=4_096)]
    preview_url: bool = False


class _Context(msgspec.Struct, forbid_unknown_fields=True):
    message_id: Annotated[str, msgspec.Meta(pattern=r"^wamid\.")]


class _Link(msgspec.Struct, forbid_unknown_fields=True):
    link: Annotated[str, msgspec.Meta(pattern="^https?://")] | None = None
    id: str | None = None
    """Of an upload."""
    filename: str | None = None


class _Variable(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: Annotated[str, msgspec.Meta(min_length=1, max_length=1_024, pattern=r"^[^\n\t]+$")]


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["body"]
    parameters: Annotated[list[_Variable], msgspec.Meta(min_length=1, max_length=1)]


class _Language(msgspec.Struct, forbid_unknown_fields=True):
    code: Literal["en_US", "de"]


class _Template(msgspec.Struct, forbid_unknown_fields=True):
    name: Literal["news"]
    """The one template that is approved."""
    language: _Language
    components: Annotated[list[_Body], msgspec.Meta(min_length=1, max_length=1)]


class _Send(msgspec.Struct, forbid_unknown_fields=True):
    messaging_product: Literal["whatsapp"]
    type: Literal["text", "image", "document", "template"]
    text: _Text | None = None
    image: _Link | None = None
    document: _Link | None = None
    template: _Template | None = None
    to: Annotated[str, msgspec.Meta(pattern="^[0-9A-Za-z]+$")] | None = None
    """A number; of a group its id."""
    recipient: Annotated[str, msgspec.Meta(pattern=r"^[A-Z]{2}\.[0-9A-Za-z.]+$")] | None = None
    """The id of a person for this business."""
    recipient_type: Literal["individual", "group"] = "individual"
    context: _Context | None = None


class _Indicator(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]


class _Read(msgspec.Struct, forbid_unknown_fields=True):
    messaging_product: Literal["whatsapp"]
    status: Literal["read"]
    message_id: Annotated[str, msgspec.Meta(pattern=r"^wamid\.")]
    typing_indicator: _Indicator | None = None


class WhatsAppStandIn(StandIn):
    """One number. `closed`: people whose last message is more than 24 hours old."""

    refuses_later = False
    """A text to a closed person is accepted, and lost; a status would report it."""

    def __init__(self) -> None:
        super().__init__()
        self.number = "".join(secrets.choice("0123456789") for _ in range(15))
        self.token = f"EAA{secrets.token_hex(40)}"
        self.secret = secrets.token_hex(16)
        self.verify_token = secrets.token_urlsafe(12)
        self.closed: set[str] = set()
        self.media: dict[str, bytes] = {}
        """Uploads by their ids."""
        self._ids = itertools.count(1)

    @property
    def credentials(self) -> dict[str, str]:
        return {
            "phone_number_id": self.number,
            "access_token": self.token,
            "app_secret": self.secret,
            "verify_token": self.verify_token,
        }

    def message(self, text: str | None = "hi", *, person: str = "491", **fields: object) -> dict[str, object]:
        message: dict[str, object] = {
            "from": person,
            "id": f"wamid.{next(self._ids)}",
            "timestamp": "1700000000",
            "type": "text",
            "text": None if text is None else {"body": text},
        }
        return {name: value for name, value in (message | fields).items() if value is not None}

    def call(self, *messages: dict[str, object], **value: object) -> tuple[bytes, dict[str, str]]:
        """Body and headers of a webhook call; `value` is added to the value of its change."""
        content = {
            "messaging_product": "whatsapp",
            "metadata": {"display_phone_number": "1555", "phone_number_id": self.number},
            "contacts": [{"profile": {"name": "A"}, "wa_id": "491"}],
            "messages": messages,
            **value,
        }
        entry = {"id": "WABA", "changes": [{"field": "messages", "value": content}]}
        return self.signed(encoded({"object": "whatsapp_business_account", "entry": [entry]}))

    def signed(self, body: bytes) -> tuple[bytes, dict[str, str]]:
        digest = hmac.new(self.secret.encode(), body, hashlib.sha256).hexdigest()
        return body, {"content-type": "application/json", "x-hub-signature-256": f"sha256={digest}"}

    def handle(self, call: Call) -> Reply:
        if call.headers.get("authorization") != f"Bearer {self.token}":
            raise Refused(_error(401, 190, "Invalid OAuth access token"))
        if call.path.startswith("/whatsapp_business/attachments/?mid="):
            return self.file(call.path.rpartition("=")[2])
        if call.method == "GET" and (id_ := call.path.removeprefix("/v21.0/")) in self.files:
            return Reply(
                200, {"id": id_, "url": f"https://lookaside.fbsbx.com/whatsapp_business/attachments/?mid={id_}"}
            )
        if (call.method, call.path) == ("GET", f"/v21.0/{self.number}?fields=display_phone_number"):
            return Reply(200, {"display_phone_number": "+1 555", "id": self.number})
        if (call.method, call.path) == ("POST", f"/v21.0/{self.number}"):
            override = msgspec.json.decode(call.body)["webhook_configuration"]
            if override["verify_token"] != self.verify_token:
                raise Refused(_error(400, 100, "verify_token"))
            self.webhook = override["override_callback_uri"]
            return Reply(200, {"success": True})
        if (call.method, call.path) == ("POST", f"/v21.0/{self.number}/media"):
            texts, files = read_form(call)
            file = files.get("file")
            if file is None or texts != {"messaging_product": "whatsapp", "type": file.content_type}:
                raise Refused(_error(400, 100, "Invalid parameter"))
            self.media[id_ := f"media.{next(self._ids)}"] = file.content
            return Reply(200, {"id": id_})
        if (call.method, call.path) != ("POST", f"/v21.0/{self.number}/messages"):
            raise Refused(_error(404, 100, "Unsupported post request"))
        try:
            if b'"status"' in call.body:
                read = msgspec.json.decode(call.body, type=_Read)
                self.signs += [read.message_id] if read.typing_indicator else []
                return Reply(200, {"success": True})
            send = msgspec.json.decode(call.body, type=_Send)
        except msgspec.DecodeError as error:
            raise Refused(_error(400, 100, f"Invalid parameter: {error}")) from error
        to = send.recipient or send.to
        if to is None or (send.recipient_type == "individual" and send.to and not send.to.isdecimal()):
            raise Refused(_error(400, 100, "The parameter to is required"))
        if to in self.closed and send.type != "template":
            if self.refuses_later:
                return _sent(to, f"wamid.{next(self._ids)}")
            raise Refused(_error(400, 131047, "Re-engagement message"))
        id_ = f"wamid.{next(self._ids)}"
        content = getattr(send, send.type)
        if content is None or [send.text, send.image, send.document, send.template].count(None) != 3:
            raise Refused(_error(400, 100, f"The parameter {send.type} is required"))
        fields = msgspec.to_builtins(send)
        if isinstance(content, _Template):
            text = content.components[0].parameters[0].text
        elif isinstance(content, _Link):
            if (content.link is None) == (content.id is None) or content.id not in (None, *self.media):
                raise Refused(_error(400, 100, "link or id"))
            text = f"[{send.type} {content.filename or content.link or content.id}]"
            fields |= {"content": self.media[content.id]} if content.id else {}
        else:
            text = content.body
        self.record(to, text, id_, fields)
        return _sent(to, id_)


def _sent(to: str, id_: str) -> Reply:
    contacts = [{"input": to, "wa_id": to}]
    return Reply(200, {"messaging_product": "whatsapp", "contacts": contacts, "messages": [{"id": id_}]})


def _error(status: int, code: int, message: str) -> Reply:
    return Reply(status, {"error": {"message": message, "type": "OAuthException", "code": code, "fbtrace_id": "x"}})
