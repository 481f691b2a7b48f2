"""A fake of open.feishu.cn, and events as Feishu sends them (https://open.feishu.cn/document/)."""

from __future__ import annotations

import base64
import hashlib
import itertools
import secrets
import time
from typing import Annotated, Any, Literal

import msgspec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7

from tooling.testing.vendors.server import Call, Refused, Reply, StandIn, encoded


class _Login(msgspec.Struct, forbid_unknown_fields=True):
    app_id: str
    app_secret: str


class _Send(msgspec.Struct, forbid_unknown_fields=True):
    msg_type: Literal["text", "post", "interactive"]
    content: str
    uuid: Annotated[str, msgspec.Meta(min_length=1, max_length=50)]
    receive_id: str | None = None
    reply_in_thread: bool = False


class _Patch(msgspec.Struct, forbid_unknown_fields=True):
    content: str


class FeishuStandIn(StandIn):
    """One app. Each uuid is accepted once; a repeat gets the same answer."""

    def __init__(self) -> None:
        super().__init__()
        self.app_id = f"cli_{secrets.token_hex(8)}"
        self.app_secret = secrets.token_hex(16)
        self.encrypt_key = secrets.token_urlsafe(16)
        self.verification_token = secrets.token_urlsafe(16)
        self.tokens: set[str] = set()
        """The access tokens that are valid. Cleared, they have run out."""
        self.repeats = 0
        self._uuids: dict[str, str] = {}
        self._ids = itertools.count(1)

    @property
    def credentials(self) -> dict[str, str]:
        return {
            "app_id": self.app_id,
            "app_secret": self.app_secret,
            "encrypt_key": self.encrypt_key,
            "verification_token": self.verification_token,
        }

    def event(
        self, text: str = "hi", *, kind: str = "text", content: object = None, **message: object
    ) -> dict[str, Any]:
        """A message event; `message` is added to the message."""
        n = next(self._ids)
        made = {
            "message_id": f"om_{n}",
            "chat_id": "oc_1",
            "chat_type": "p2p",
            "message_type": kind,
            "content": encoded(content or {"text": text}).decode(),
        }
        return {
            "schema": "2.0",
            "header": {
                "event_id": f"e{n}",
                "token": self.verification_token,
                "create_time": "1700000000000",
                "event_type": "im.message.receive_v1",
                "tenant_key": "tk",
                "app_id": self.app_id,
            },
            "event": {
                "sender": {"sender_id": {"open_id": "ou_1"}, "sender_type": "user", "tenant_key": "tk"},
                "message": made | message,
            },
        }

    def about(self, kind: str, **fields: object) -> dict[str, Any]:
        """An event of another kind than a message."""
        event = self.event()
        event["header"]["event_type"] = kind
        return event | {"event": fields}

    def encrypted(self, payload: Any) -> bytes:
        """The body of a call: any payload, encrypted."""
        key = hashlib.sha256(self.encrypt_key.encode()).digest()
        iv = secrets.token_bytes(16)
        padder = PKCS7(128).padder()
        content = payload if isinstance(payload, bytes) else encoded(payload)
        closer = Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor()
        sealed = closer.update(padder.update(content) + padder.finalize()) + closer.finalize()
        return encoded({"encrypt": base64.b64encode(iv + sealed).decode()})

    def call(self, payload: Any, *, age: int = 0) -> tuple[bytes, dict[str, str]]:
        """Body and headers of a call, signed `age` seconds ago."""
        body = self.encrypted(payload)
        timestamp, nonce = str(int(time.time()) - age), secrets.token_hex(8)
        signed = (timestamp + nonce + self.encrypt_key).encode() + body
        return body, {
            "content-type": "application/json",
            "x-lark-request-timestamp": timestamp,
            "x-lark-request-nonce": nonce,
            "x-lark-signature": hashlib.sha256(signed).hexdigest(),
        }

    def handle(self, call: Call) -> Reply:
        path = call.path.partition("?")[0]
        if path == "/open-apis/auth/v3/tenant_access_token/internal":
            login = msgspec.json.decode(call.body, type=_Login)
            if (login.app_id, login.app_secret) != (self.app_id, self.app_secret):
                raise Refused(Reply(200, {"code": 10014, "msg": "app secret invalid"}))
            token = f"t-{secrets.token_hex(16)}"
            self.tokens.add(token)
            return Reply(200, {"code": 0, "msg": "ok", "tenant_access_token": token, "expire": 7200})
        if call.headers.get("authorization", "").removeprefix("Bearer ") not in self.tokens:
            raise Refused(Reply(400, {"code": 99991663, "msg": "Invalid access token"}))
        if call.method == "GET" and "/resources/" in path:
            if call.path.partition("?")[2] != ("type=image" if "/img_" in path else "type=file"):
                raise Refused(Reply(400, {"code": 234001, "msg": "type"}))
            parts = path.split("/")
            return self.file(f"{parts[5]}/{parts[7]}")
        if (call.method, path) == ("GET", "/open-apis/bot/v3/info"):
            return Reply(200, {"code": 0, "msg": "ok", "bot": {"app_name": "Ada", "open_id": "ou_bot"}})
        if call.method in ("PATCH", "DELETE"):
            return self._change(path.removeprefix("/open-apis/im/v1/messages/"), call)
        try:
            send = msgspec.json.decode(call.body, type=_Send)
            content = msgspec.json.decode(send.content)
        except msgspec.DecodeError as error:
            raise Refused(Reply(400, {"code": 230001, "msg": str(error)})) from error
        thread = path.removeprefix("/open-apis/im/v1/messages/").removesuffix("/reply")
        if path == "/open-apis/im/v1/messages" and call.path.endswith("?receive_id_type=chat_id") and send.receive_id:
            to = send.receive_id
        elif path.endswith("/reply") and thread.startswith("om_") and send.reply_in_thread and not send.receive_id:
            to = thread
        else:
            raise Refused(Reply(400, {"code": 230001, "msg": "invalid request"}))
        if len(call.body) > (150_000 if send.msg_type == "text" else 30_000):
            raise Refused(Reply(400, {"code": 230025, "msg": "The length of the message content reaches its limit"}))
        if send.msg_type == "interactive":
            text = _card(content)
        else:
            text = content["text"] if send.msg_type == "text" else content["zh_cn"]["content"][0][0]["text"]
        if send.uuid in self._uuids:
            self.repeats += 1
        else:
            self._uuids[send.uuid] = f"om_{next(self._ids)}"
            self.record(to, text, self._uuids[send.uuid], msgspec.to_builtins(send))
        return Reply(200, {"code": 0, "msg": "success", "data": {"message_id": self._uuids[send.uuid]}})

    def _change(self, id_: str, call: Call) -> Reply:
        """Edits or deletes a message; only cards are edited so."""
        if call.method == "DELETE":
            done = self.withdraw(id_)
        else:
            content = msgspec.json.decode(call.body, type=_Patch).content
            if len(call.body) > 30_000:
                raise Refused(Reply(400, {"code": 230025, "msg": "The message is too long"}))
            cards = [message.id for message in self.ledger if message.fields["msg_type"] == "interactive"]
            done = id_ in cards and self.change(id_, _card(msgspec.json.decode(content)))
        if not done:
            raise Refused(Reply(400, {"code": 230001, "msg": "message_id"}))
        return Reply(200, {"code": 0, "msg": "success", "data": {}})


def _card(content: Any) -> str:
    """The text of a card with one element of Markdown, which everybody sees changing."""
    assert (content["schema"], content["config"]) == ("2.0", {"update_multi": True})
    [element] = content["body"]["elements"]
    assert element["tag"] == "markdown"
    return str(element["content"])
