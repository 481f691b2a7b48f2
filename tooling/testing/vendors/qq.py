"""A fake of api.sgroup.qq.com and bots.qq.com, and events as QQ sends them (https://bot.q.qq.com/wiki/)."""

from __future__ import annotations

import itertools
import re
import secrets
import time
from typing import Annotated, Any, Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tooling.testing.vendors.server import Call, Refused, Reply, StandIn, encoded

# QQ also takes names of files for addresses.
_ADDRESS = re.compile(r"[a-z0-9-]\.[a-z]{2,}", re.IGNORECASE)


class _Login(msgspec.Struct, forbid_unknown_fields=True):
    appId: str
    clientSecret: str


class _Send(msgspec.Struct, forbid_unknown_fields=True):
    content: Annotated[str, msgspec.Meta(min_length=1)]
    msg_type: Literal[0]
    msg_id: str
    msg_seq: Annotated[int, msgspec.Meta(ge=1)]


class QQStandIn(StandIn):
    """One bot. A message may be answered five times, and each number once. A text with an address is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.app_id = str(secrets.randbelow(10**8) + 10**8)
        self.secret = secrets.token_urlsafe(12)
        self.tokens: set[str] = set()
        """The access tokens that are valid. Cleared, they have run out."""
        self.repeats = 0
        self._sent: dict[str, set[int]] = {}
        self._ids = itertools.count(1)

    @property
    def credentials(self) -> dict[str, str]:
        return {"app_id": self.app_id, "secret": self.secret}

    @property
    def key(self) -> Ed25519PrivateKey:
        seed = self.secret
        while len(seed) < 32:
            seed += self.secret
        return Ed25519PrivateKey.from_private_bytes(seed[:32].encode())

    def event(self, text: str = "hi", *, group: str | None = None, **fields: object) -> dict[str, Any]:
        """A message of a person, or in a group; `fields` are added to it."""
        n = next(self._ids)
        author = {"member_openid": "m1"} if group else {"user_openid": "u1"}
        message = {"id": f"msg{n}", "author": author, "content": text, "timestamp": "2026-01-01T00:00:00+08:00"}
        if group:
            message["group_openid"] = group
        kind = "GROUP_AT_MESSAGE_CREATE" if group else "C2C_MESSAGE_CREATE"
        return {"id": f"e{n}", "op": 0, "t": kind, "d": message | fields}

    def signed(self, payload: Any, *, age: int = 0) -> tuple[bytes, dict[str, str]]:
        """Body and headers of a call, signed `age` seconds ago."""
        body = payload if isinstance(payload, bytes) else encoded(payload)
        timestamp = str(int(time.time()) - age)
        signature = self.key.sign(timestamp.encode() + body).hex()
        return body, {"x-signature-timestamp": timestamp, "x-signature-ed25519": signature}

    def handle(self, call: Call) -> Reply:
        if (call.method, call.path) == ("POST", "/app/getAppAccessToken"):
            login = msgspec.json.decode(call.body, type=_Login)
            if (login.appId, login.clientSecret) != (self.app_id, self.secret):
                raise Refused(Reply(200, {"code": 100016, "message": "invalid appid or secret"}))
            token = secrets.token_urlsafe(24)
            self.tokens.add(token)
            return Reply(200, {"access_token": token, "expires_in": "7200"})
        if call.path in self.files:
            return self.file(call.path)
        match call.method, call.path.split("/"):
            case "GET", ["", "users", "@me"]:
                to = ""
            case "POST", ["", "v2", ("users" | "groups") as kind, place, "messages"]:
                to = f"{kind}/{place}"
            case _:
                raise Refused(Reply(404, {"code": 404, "message": "not found"}))
        if call.headers.get("authorization", "").removeprefix("QQBot ") not in self.tokens:
            raise Refused(Reply(401, {"code": 11244, "message": "token not exist or expire"}))
        if not to:
            return Reply(200, {"id": "1", "username": "ada"})
        try:
            send = msgspec.json.decode(call.body, type=_Send)
        except msgspec.DecodeError as error:
            raise Refused(Reply(400, {"code": 50006, "message": str(error)})) from error
        sent = self._sent.setdefault(send.msg_id, set())
        if send.msg_seq in sent:
            self.repeats += 1
            return Reply(400, {"code": 40054005, "message": "the message was sent before"})
        if _ADDRESS.search(send.content):
            return Reply(400, {"code": 40054010, "message": "url not allowed"})
        if len(sent) == 5:
            raise Refused(Reply(400, {"code": 304031, "message": "passive replies are used up"}))
        sent.add(send.msg_seq)
        id_ = f"r{next(self._ids)}"
        self.record(to, send.content, id_, msgspec.to_builtins(send))
        return Reply(200, {"id": id_, "timestamp": "2026-01-01T00:00:00+08:00"})
