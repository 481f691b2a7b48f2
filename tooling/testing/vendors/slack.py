"""A fake of slack.com, and events as Slack sends them (https://docs.slack.dev/apis/events-api)."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import re
import secrets
import time
from typing import Annotated, Any
from urllib.parse import parse_qsl

import msgspec

from tooling.testing.vendors.server import Call, Refused, Reply, StandIn, encoded

BOT = "U0BOT"


class _PostMessage(msgspec.Struct, forbid_unknown_fields=True):
    channel: str
    text: Annotated[str, msgspec.Meta(min_length=1, max_length=40_000)]
    thread_ts: Annotated[str, msgspec.Meta(pattern=r"^\d+\.\d{6}$")] | None = None


class _Update(msgspec.Struct, forbid_unknown_fields=True):
    channel: str
    ts: str
    text: Annotated[str, msgspec.Meta(min_length=1, max_length=4_000)]


class _Delete(msgspec.Struct, forbid_unknown_fields=True):
    channel: str
    ts: str


_METHODS: dict[str, type[Any]] = {
    "/api/chat.postMessage": _PostMessage,
    "/api/chat.update": _Update,
    "/api/chat.delete": _Delete,
}
_FORMS = ("/api/files.getUploadURLExternal", "/api/files.completeUploadExternal", "/api/files.info")


class SlackStandIn(StandIn):
    """One app in one workspace. `unknown`: channels that do not exist; `revoked`: the token is no longer valid."""

    def __init__(self) -> None:
        super().__init__()
        self.signing_secret = secrets.token_hex(16)
        self.bot_token = f"xoxb-{secrets.token_hex(20)}"
        self.unknown: set[str] = set()
        """Channels that do not exist."""
        self.revoked = False
        """The token is not valid any more."""
        self._events = itertools.count(1)
        self._sent = itertools.count()
        self.upload_origin = "https://files.slack.com"
        self._uploads: dict[str, tuple[str, int]] = {}
        """Paths of uploads → the name and the length of the file."""

    @property
    def credentials(self) -> dict[str, str]:
        return {"signing_secret": self.signing_secret, "bot_token": self.bot_token}

    def event(
        self, text: str, *, channel: str = "C1", user: str | None = "U1", kind: str = "message", **fields: object
    ) -> tuple[bytes, dict[str, str]]:
        """Body and headers of a webhook call for a message. `fields` are added to the event."""
        n = next(self._events)
        ts = f"1700000000.{n:06}"
        event = {"type": kind, "channel": channel, "user": user, "text": text, "ts": ts, "event_ts": ts, **fields}
        return self.signed(
            {
                "token": "deprecated",
                "team_id": "T1",
                "api_app_id": "A1",
                "event": event,
                "type": "event_callback",
                "event_id": f"Ev{n}",
                "event_time": 1700000000,
                "authorizations": [{"team_id": "T1", "user_id": BOT, "is_bot": True}],
            }
        )

    def signed(self, payload: object, *, age: int = 0) -> tuple[bytes, dict[str, str]]:
        """Body and headers of a call with any payload, as JSON signed `age` seconds ago."""
        return self.signed_bytes(encoded(payload), age=age)

    def signed_bytes(self, body: bytes, *, age: int = 0) -> tuple[bytes, dict[str, str]]:
        """Body and headers of a call with any body, signed `age` seconds ago."""
        timestamp = str(int(time.time()) - age)
        digest = hmac.new(self.signing_secret.encode(), f"v0:{timestamp}:".encode() + body, hashlib.sha256)
        return body, {
            "content-type": "application/json",
            "x-slack-request-timestamp": timestamp,
            "x-slack-signature": f"v0={digest.hexdigest()}",
        }

    def handle(self, call: Call) -> Reply:
        if call.path.startswith("/files-pri/"):
            if call.headers.get("authorization") != f"Bearer {self.bot_token}":
                return Reply(200, b"<!DOCTYPE html><html>Sign in</html>")
            return self.file(call.path)
        if call.path.startswith("/upload/"):
            if len(call.body) != self._uploads[call.path][1]:
                raise Refused(Reply(400, b"length"))
            self.files[call.path] = call.body
            return Reply(200, b"OK")
        if call.method != "POST" or call.path not in (*_METHODS, *_FORMS, "/api/auth.test"):
            raise Refused(Reply(404, {"ok": False, "error": "unknown_method"}))
        if self.revoked or call.headers.get("authorization") != f"Bearer {self.bot_token}":
            raise Refused(Reply(200, {"ok": False, "error": "invalid_auth"}))
        if call.path in _FORMS:
            return self._upload(call)
        if call.path == "/api/auth.test":
            return Reply(200, {"ok": True, "user": "ada", "team": "Example", "user_id": BOT, "team_id": "T1"})
        if not call.headers.get("content-type", "").startswith("application/json"):
            raise Refused(Reply(200, {"ok": False, "error": "invalid_form_data"}))
        try:
            message = msgspec.json.decode(call.body, type=_METHODS[call.path])
        except msgspec.DecodeError as error:
            raise Refused(Reply(200, {"ok": False, "error": "invalid_arguments", "detail": str(error)})) from error
        if message.channel in self.unknown:
            raise Refused(Reply(200, {"ok": False, "error": "channel_not_found"}))
        if isinstance(message, _Delete):
            if not self.withdraw(message.ts):
                raise Refused(Reply(200, {"ok": False, "error": "message_not_found"}))
            return Reply(200, {"ok": True, "channel": message.channel, "ts": message.ts})
        if re.search(r"<(?!https?://|mailto:)", message.text):
            raise Refused(Reply(200, {"ok": False, "error": "mention_or_broken_link"}))
        shown = message.text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        if isinstance(message, _Update):
            if not self.change(message.ts, shown):
                raise Refused(Reply(200, {"ok": False, "error": "message_not_found"}))
            return Reply(200, {"ok": True, "channel": message.channel, "ts": message.ts, "text": message.text})
        ts = f"{int(time.time())}.{next(self._sent):06}"
        to = message.channel + (f"/{message.thread_ts}" if message.thread_ts else "")
        self.record(to, shown, ts, msgspec.to_builtins(message))
        return Reply(200, {"ok": True, "channel": message.channel, "ts": ts, "message": {"text": message.text}})

    def _upload(self, call: Call) -> Reply:
        if call.headers.get("content-type") != "application/x-www-form-urlencoded":
            raise Refused(Reply(200, {"ok": False, "error": "invalid_arguments"}))
        form = dict(parse_qsl(call.body.decode(), strict_parsing=True))
        if call.path == "/api/files.info":
            return Reply(200, {"ok": True, "file": {"id": form["file"], "url_private": f"/files-pri/{form['file']}"}})
        if call.path == "/api/files.getUploadURLExternal":
            path = f"/upload/v1/{len(self._uploads)}"
            self._uploads[path] = form["filename"], int(form["length"])
            return Reply(200, {"ok": True, "upload_url": f"{self.upload_origin}{path}", "file_id": path})
        if form["channel_id"] in self.unknown:
            raise Refused(Reply(200, {"ok": False, "error": "channel_not_found"}))
        for file in msgspec.json.decode(form["files"]):
            if file["id"] not in self.files:
                raise Refused(Reply(200, {"ok": False, "error": "file_not_found"}))
            to = form["channel_id"] + (f"/{form['thread_ts']}" if "thread_ts" in form else "")
            self.record(to, f"[file {file['title']}]", file["id"], {"content": self.files[file["id"]]})
        return Reply(200, {"ok": True, "files": []})
