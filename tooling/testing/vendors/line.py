"""A fake of api.line.me, and events as LINE sends them (https://developers.line.biz/en/reference/messaging-api/)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import secrets
from typing import Annotated, Literal
from uuid import UUID

import msgspec

from tooling.testing.vendors.server import Call, Refused, Reply, StandIn, encoded


class _Text(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    text: Annotated[str, msgspec.Meta(min_length=1)]


class _Image(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="image"):
    originalContentUrl: Annotated[str, msgspec.Meta(pattern="^https://", max_length=2_000)]
    previewImageUrl: Annotated[str, msgspec.Meta(pattern="^https://", max_length=2_000)]

    @property
    def text(self) -> str:
        return f"[image {self.originalContentUrl}]"


class _Push(msgspec.Struct, forbid_unknown_fields=True):
    to: Annotated[str, msgspec.Meta(pattern="^[UCR][0-9a-f]+$")]
    messages: Annotated[list[_Text | _Image], msgspec.Meta(min_length=1, max_length=5)]


class _Loading(msgspec.Struct, forbid_unknown_fields=True):
    chatId: Annotated[str, msgspec.Meta(pattern="^U[0-9a-f]+$")]
    loadingSeconds: Literal[5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60]


class LineStandIn(StandIn):
    """One channel. Each retry key is accepted once; a repeat is answered 409."""

    def __init__(self) -> None:
        super().__init__()
        self.secret = secrets.token_hex(16)
        self.token = secrets.token_urlsafe(60)
        self.repeats = 0
        self._keys: dict[UUID, str] = {}
        self._ids = itertools.count(1)

    @property
    def credentials(self) -> dict[str, str]:
        return {"channel_secret": self.secret, "channel_access_token": self.token}

    def event(
        self, text: str | None = "hi", *, source: dict[str, str] | None = None, **fields: object
    ) -> dict[str, object]:
        n = next(self._ids)
        return {
            "type": "message",
            "message": {"type": "text", "id": str(n), "quoteToken": "q", "text": text},
            "timestamp": 1700000000000,
            "source": source or {"type": "user", "userId": "U1"},
            "replyToken": "rt",
            "mode": "active",
            "webhookEventId": f"01H{n}",
            "deliveryContext": {"isRedelivery": False},
            **fields,
        }

    def call(self, *events: dict[str, object]) -> tuple[bytes, dict[str, str]]:
        """Body and headers of a webhook call."""
        return self.signed(encoded({"destination": "Ub0", "events": events}))

    def signed(self, body: bytes) -> tuple[bytes, dict[str, str]]:
        digest = hmac.new(self.secret.encode(), body, hashlib.sha256).digest()
        return body, {"content-type": "application/json", "x-line-signature": base64.b64encode(digest).decode()}

    def handle(self, call: Call) -> Reply:
        if call.headers.get("authorization") != f"Bearer {self.token}":
            raise Refused(Reply(401, {"message": "Authentication failed"}))
        if call.path.startswith("/v2/bot/message/") and call.path.endswith("/content"):
            return self.file(call.path.split("/")[4])
        if (call.method, call.path) == ("GET", "/v2/bot/info"):
            return Reply(200, {"userId": "Ub0", "basicId": "@ada", "displayName": "Ada"})
        if (call.method, call.path) == ("PUT", "/v2/bot/channel/webhook/endpoint"):
            self.webhook = msgspec.json.decode(call.body)["endpoint"]
            return Reply(200, {})
        if (call.method, call.path) == ("POST", "/v2/bot/chat/loading/start"):
            self.signs.append(msgspec.json.decode(call.body, type=_Loading).chatId)
            return Reply(202, {})
        if (call.method, call.path) != ("POST", "/v2/bot/message/push"):
            raise Refused(Reply(404, {"message": "Not found"}))
        try:
            key = UUID(call.headers.get("x-line-retry-key", ""))
            push = msgspec.json.decode(call.body, type=_Push)
        except (ValueError, msgspec.DecodeError) as error:
            raise Refused(Reply(400, {"message": str(error)})) from error
        if any(len(message.text.encode("utf-16-le")) > 10_000 for message in push.messages):
            raise Refused(Reply(400, {"message": "Length must be between 0 and 5000"}))
        if key in self._keys:
            self.repeats += 1
            sent = [{"id": self._keys[key]}]
            return Reply(409, {"message": "The retry key is already accepted", "sentMessages": sent})
        self._keys[key] = id_ = str(next(self._ids))
        for message in push.messages:
            self.record(push.to, message.text, id_, msgspec.to_builtins(push))
        return Reply(200, {"sentMessages": [{"id": id_, "quoteToken": "q"}]})
