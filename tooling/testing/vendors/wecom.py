"""A fake of qyapi.weixin.qq.com, and messages as WeCom sends them (https://developer.work.weixin.qq.com/document/)."""

from __future__ import annotations

import base64
import hashlib
import itertools
import secrets
import struct
import time
from typing import Annotated, Literal
from urllib.parse import parse_qs, urlencode

import msgspec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tooling.testing.vendors.server import Call, Refused, Reply, StandIn


class _Text(msgspec.Struct, forbid_unknown_fields=True):
    content: Annotated[str, msgspec.Meta(min_length=1)]


class _Send(msgspec.Struct, forbid_unknown_fields=True):
    touser: str
    msgtype: Literal["text"]
    agentid: int
    text: _Text
    enable_duplicate_check: Literal[1]
    duplicate_check_interval: Annotated[int, msgspec.Meta(le=14_400)]


class WeComStandIn(StandIn):
    """One app of one company. The same text to the same person is accepted once; a repeat gets the same answer."""

    def __init__(self) -> None:
        super().__init__()
        self.corp_id = f"ww{secrets.token_hex(8)}"
        self.secret = secrets.token_urlsafe(32)
        self.token = secrets.token_hex(8)
        self.aes_key = base64.b64encode(secrets.token_bytes(32)).decode().removesuffix("=")
        self.agent_id = 1_000_002
        self.tokens: set[str] = set()
        """The access tokens that are valid. Cleared, they have run out."""
        self.unknown: set[str] = set()
        self.repeats = 0
        self._seen: dict[tuple[str, str], str] = {}
        self._ids = itertools.count(1)

    @property
    def credentials(self) -> dict[str, str]:
        return {
            "corp_id": self.corp_id,
            "agent_id": str(self.agent_id),
            "secret": self.secret,
            "token": self.token,
            "encoding_aes_key": self.aes_key,
        }

    def message(self, text: str = "hi", *, person: str = "ada", **fields: str) -> bytes:
        """The XML of a message; `fields` are added to it."""
        given = {
            "ToUserName": self.corp_id,
            "FromUserName": person,
            "CreateTime": "1",
            "MsgType": "text",
            "Content": text,
            "MsgId": str(next(self._ids)),
            "AgentID": str(self.agent_id),
        }
        inner = "".join(f"<{name}><![CDATA[{value}]]></{name}>" for name, value in (given | fields).items())
        return f"<xml>{inner}</xml>".encode()

    def encrypted(self, content: bytes, *, receiver: str | None = None) -> str:
        key = base64.b64decode(f"{self.aes_key}=")
        plain = (
            secrets.token_bytes(16) + struct.pack(">I", len(content)) + content + (receiver or self.corp_id).encode()
        )
        padding = 32 - len(plain) % 32
        closer = Cipher(algorithms.AES(key), modes.CBC(key[:16])).encryptor()
        return base64.b64encode(closer.update(plain + bytes([padding]) * padding) + closer.finalize()).decode()

    def query(self, encrypted: str, *, age: int = 0, **more: str) -> str:
        """The query of a call, signed `age` seconds ago."""
        timestamp, nonce = str(int(time.time()) - age), secrets.token_hex(4)
        signature = hashlib.sha1("".join(sorted((self.token, timestamp, nonce, encrypted))).encode()).hexdigest()
        return urlencode({"msg_signature": signature, "timestamp": timestamp, "nonce": nonce, **more})

    def call(self, content: bytes, *, age: int = 0, receiver: str | None = None) -> tuple[bytes, str]:
        """Body and query of a call."""
        encrypted = self.encrypted(content, receiver=receiver)
        body = f"<xml><ToUserName>{self.corp_id}</ToUserName><Encrypt><![CDATA[{encrypted}]]></Encrypt></xml>"
        return body.encode(), self.query(encrypted, age=age)

    def handle(self, call: Call) -> Reply:
        path, _, query = call.path.partition("?")
        asked = {name: values[0] for name, values in parse_qs(query).items()}
        if (call.method, path) == ("GET", "/cgi-bin/gettoken"):
            if (asked.get("corpid"), asked.get("corpsecret")) != (self.corp_id, self.secret):
                raise Refused(Reply(200, {"errcode": 40001, "errmsg": "invalid credential"}))
            token = secrets.token_urlsafe(32)
            self.tokens.add(token)
            return Reply(200, {"errcode": 0, "errmsg": "ok", "access_token": token, "expires_in": 7200})
        if asked.get("access_token") not in self.tokens:
            raise Refused(Reply(200, {"errcode": 42001, "errmsg": "access_token expired"}))
        if (call.method, path) == ("GET", "/cgi-bin/media/get"):
            if (id_ := asked.get("media_id", "")) not in self.files:
                raise Refused(Reply(200, {"errcode": 40007, "errmsg": "invalid media_id"}))
            return self.file(id_)
        if (call.method, path) == ("GET", "/cgi-bin/agent/get") and asked.get("agentid") == str(self.agent_id):
            return Reply(200, {"errcode": 0, "errmsg": "ok", "agentid": self.agent_id, "name": "Ada"})
        if (call.method, path) != ("POST", "/cgi-bin/message/send"):
            raise Refused(Reply(404, {"errcode": 404, "errmsg": "not found"}))
        try:
            send = msgspec.json.decode(call.body, type=_Send)
        except msgspec.DecodeError as error:
            raise Refused(Reply(200, {"errcode": 40058, "errmsg": str(error)})) from error
        if send.agentid != self.agent_id or len(send.text.content.encode()) > 2_048:
            raise Refused(Reply(200, {"errcode": 40058, "errmsg": "agentid or content"}))
        if send.touser in self.unknown:
            raise Refused(Reply(200, {"errcode": 81013, "errmsg": "user & party & tag all invalid"}))
        known = send.touser, send.text.content
        if known in self._seen:
            self.repeats += 1
        else:
            self._seen[known] = f"m{next(self._ids)}"
            self.record(
                send.touser, send.text.content.rstrip("\u200b\u200c"), self._seen[known], msgspec.to_builtins(send)
            )
        return Reply(200, {"errcode": 0, "errmsg": "ok", "msgid": self._seen[known]})
