"""A fake of oapi.dingtalk.com and api.dingtalk.com, and messages as DingTalk sends them.

https://open.dingtalk.com/document/orgapp/receive-message
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import secrets
import time
from typing import Annotated, Any, Literal

import msgspec

from tooling.testing.vendors.server import Call, Refused, Reply, StandIn, encoded


class _Markdown(msgspec.Struct, forbid_unknown_fields=True):
    title: Annotated[str, msgspec.Meta(min_length=1)]
    text: Annotated[str, msgspec.Meta(min_length=1)]


class _Reply(msgspec.Struct, forbid_unknown_fields=True):
    msgtype: Literal["markdown"]
    markdown: _Markdown


class _Login(msgspec.Struct, forbid_unknown_fields=True):
    appKey: str
    appSecret: str


class _Proactive(msgspec.Struct, forbid_unknown_fields=True):
    robotCode: str
    msgKey: Literal["sampleMarkdown"]
    msgParam: str
    userIds: list[str] | None = None
    openConversationId: str | None = None


class DingTalkStandIn(StandIn):
    """One robot. `expired`: sessions whose webhook is over."""

    def __init__(self) -> None:
        super().__init__()
        self.app_key = f"ding{secrets.token_hex(8)}"
        self.app_secret = secrets.token_urlsafe(32)
        self.expired: set[str] = set()
        self.tokens: set[str] = set()
        """The access tokens that are valid. Cleared, they have run out."""
        self._sessions: dict[str, str] = {}
        self._ids = itertools.count(1)

    @property
    def credentials(self) -> dict[str, str]:
        return {"app_key": self.app_key, "app_secret": self.app_secret, "robot_code": self.app_key}

    def message(self, text: str | None = " hi", *, group: str | None = None, **fields: object) -> dict[str, Any]:
        """A message to the robot; `fields` are added to it, null ones are left out."""
        n = next(self._ids)
        session = secrets.token_hex(16)
        self._sessions[session] = group or "s1"
        given = {
            "conversationId": group or "cid1",
            "conversationType": "2" if group else "1",
            "msgId": f"msg{n}",
            "senderNick": "A",
            "senderStaffId": "s1",
            "senderId": "$:1",
            "chatbotUserId": "$:bot",
            "robotCode": self.app_key,
            "msgtype": "text",
            "sessionWebhook": f"https://oapi.dingtalk.com/robot/sendBySession?session={session}",
            "sessionWebhookExpiredTime": 1700005400000,
            "text": None if text is None else {"content": text},
        }
        return {name: value for name, value in (given | fields).items() if value is not None}

    def signed(self, payload: Any, *, age: int = 0) -> tuple[bytes, dict[str, str]]:
        """Body and headers of a call, signed `age` seconds ago."""
        body = payload if isinstance(payload, bytes) else encoded(payload)
        timestamp = str(int(time.time() * 1_000) - age * 1_000)
        signed = f"{timestamp}\n{self.app_secret}".encode()
        digest = hmac.new(self.app_secret.encode(), signed, hashlib.sha256).digest()
        return body, {"timestamp": timestamp, "sign": base64.b64encode(digest).decode()}

    def press(self, params: dict[str, Any] | None = None, **fields: object) -> dict[str, Any]:
        """A person's press of a button of a card; `fields` are added to it."""
        private = {"cardPrivateData": {"actionIds": ["agree"], "params": params or {}}}
        given = {
            "type": "actionCallback",
            "outTrackId": f"card{next(self._ids)}",
            "corpId": "dingCorp",
            "userId": "s1",
            "userIdType": 1,
            "spaceType": "IM_ROBOT",
            "spaceId": "s1",
            "extension": "{}",
            "content": encoded(private).decode(),
        }
        return given | fields

    def signed_press(self, payload: Any, *, age: int = 0) -> tuple[bytes, dict[str, str]]:
        """Body and headers of a card's call, signed `age` seconds ago."""
        timestamp = str(int(time.time() * 1_000) - age * 1_000)
        digest = base64.b64encode(hmac.digest(self.app_secret.encode(), timestamp.encode(), hashlib.sha256)).decode()
        headers = {"x-ddpaas-signature-timestamp": timestamp, "x-ddpaas-signature": digest}
        return encoded(payload), headers

    def handle(self, call: Call) -> Reply:
        path, _, query = call.path.partition("?")
        if path.startswith("/oss/"):
            return self.file(path.removeprefix("/oss/"))
        if path == "/v1.0/robot/messageFiles/download":
            asked = msgspec.json.decode(call.body)
            if call.headers.get("x-acs-dingtalk-access-token") not in self.tokens or asked["robotCode"] != self.app_key:
                raise Refused(Reply(401, {"code": "InvalidAuthentication", "message": "invalid token"}))
            return Reply(200, {"downloadUrl": f"https://down.dingtalk.com/oss/{asked['downloadCode']}?sign=x"})
        try:
            match call.method, path:
                case "POST", "/robot/sendBySession":
                    return self._reply(query.removeprefix("session="), msgspec.json.decode(call.body, type=_Reply))
                case "POST", "/v1.0/oauth2/accessToken":
                    return self._login(msgspec.json.decode(call.body, type=_Login))
                case "POST", "/v1.0/robot/oToMessages/batchSend" | "/v1.0/robot/groupMessages/send":
                    return self._proactive(call, msgspec.json.decode(call.body, type=_Proactive))
        except msgspec.DecodeError as error:
            raise Refused(Reply(200, {"errcode": 40035, "errmsg": str(error)})) from error
        raise Refused(Reply(404, {"code": "NotFound", "message": path}))

    def _reply(self, session: str, reply: _Reply) -> Reply:
        if session not in self._sessions or session in self.expired:
            raise Refused(Reply(200, {"errcode": 300001, "errmsg": "session is not exist"}))
        if len(reply.markdown.text.encode()) > 20_000:
            raise Refused(Reply(200, {"errcode": 460101, "errmsg": "message too long"}))
        self.record(self._sessions[session], reply.markdown.text, session, msgspec.to_builtins(reply))
        return Reply(200, {"errcode": 0, "errmsg": "ok"})

    def _login(self, login: _Login) -> Reply:
        if (login.appKey, login.appSecret) != (self.app_key, self.app_secret):
            raise Refused(Reply(400, {"code": "invalidClientIdOrSecret", "message": "wrong secret"}))
        token = secrets.token_hex(16)
        self.tokens.add(token)
        return Reply(200, {"accessToken": token, "expireIn": 7200})

    def _proactive(self, call: Call, send: _Proactive) -> Reply:
        if call.headers.get("x-acs-dingtalk-access-token") not in self.tokens:
            raise Refused(Reply(401, {"code": "InvalidAuthentication", "message": "invalid token"}))
        is_group = call.path.endswith("groupMessages/send")
        to = send.openConversationId if is_group else next(iter(send.userIds or ()), None)
        if send.robotCode != self.app_key or to is None:
            raise Refused(Reply(400, {"code": "robot 不存在", "message": "robot or receiver"}))
        markdown = msgspec.json.decode(send.msgParam, type=_Markdown)
        key = secrets.token_hex(8)
        self.record(to, markdown.text, key, msgspec.to_builtins(send))
        return Reply(200, {"processQueryKey": key})
