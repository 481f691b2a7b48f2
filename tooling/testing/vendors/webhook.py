"""A fake of a program that talks to a channel of type ``webhook``, by Standard Webhooks in both directions."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import time
from typing import Any

import msgspec

from tooling.testing.vendors.server import Call, Refused, Reply, StandIn, encoded


class _Reply(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    conversation_id: str
    text: str
    run_id: str | None
    attachments: list[dict[str, str]] = []


class WebhookStandIn(StandIn):
    """Accepts each ``webhook-id`` once. A repeat gets the same answer and is not recorded again."""

    def __init__(self) -> None:
        super().__init__()
        self.key = secrets.token_bytes(32)
        self.gone = False
        self.repeats = 0
        self._seen: dict[str, bytes] = {}

    @property
    def credentials(self) -> dict[str, str]:
        return {"secret": "whsec_" + base64.b64encode(self.key).decode(), "reply_url": f"{self.url}/replies"}

    def message(
        self, text: str, *, conversation: str = "c1", user: str = "u1", id_: str | None = None, age: int = 0
    ) -> tuple[bytes, dict[str, str]]:
        """Body and headers of a call for a message that was signed `age` seconds ago."""
        return self.signed({"conversation_id": conversation, "user_id": user, "text": text}, id_=id_, age=age)

    def signed(self, payload: Any, *, id_: str | None = None, age: int = 0) -> tuple[bytes, dict[str, str]]:
        """Body and headers of a call with any payload: bytes as they are, any other value as JSON."""
        body = payload if isinstance(payload, bytes) else encoded(payload)
        id_ = id_ or f"msg_{secrets.token_hex(12)}"
        timestamp = str(int(time.time()) - age)
        return body, {
            "content-type": "application/json",
            "webhook-id": id_,
            "webhook-timestamp": timestamp,
            "webhook-signature": self._signature(id_, timestamp, body),
        }

    def handle(self, call: Call) -> Reply:
        if call.method == "GET":
            return self.file(call.path)
        if self.gone:
            raise Refused(Reply(410, None))
        id_, timestamp = call.headers.get("webhook-id", ""), call.headers.get("webhook-timestamp", "")
        if (call.method, call.path) != ("POST", "/replies"):
            raise Refused(Reply(404, None))
        if not id_ or "." in id_ or not timestamp.isdigit() or abs(time.time() - int(timestamp)) > 300:
            raise Refused(Reply(400, {"error": "webhook-id or webhook-timestamp"}))
        if self._signature(id_, timestamp, call.body) not in call.headers.get("webhook-signature", "").split(" "):
            raise Refused(Reply(401, {"error": "webhook-signature"}))
        if call.body == b'{"type":"test"}':
            return Reply(200, None)
        if id_ in self._seen:
            if self._seen[id_] != call.body:
                raise Refused(Reply(409, {"error": "webhook-id was used for another message"}))
            self.repeats += 1
            return Reply(200, None)
        try:
            reply = msgspec.json.decode(call.body, type=_Reply)
        except msgspec.DecodeError as error:
            raise Refused(Reply(400, {"error": str(error)})) from error
        self._seen[id_] = call.body
        self.record(reply.conversation_id, reply.text, id_, msgspec.to_builtins(reply))
        return Reply(200, None)

    def _signature(self, id_: str, timestamp: str, body: bytes) -> str:
        signed = f"{id_}.{timestamp}.".encode() + body
        return "v1," + base64.b64encode(hmac.new(self.key, signed, hashlib.sha256).digest()).decode()
