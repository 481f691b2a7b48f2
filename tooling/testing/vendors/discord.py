"""A fake of discord.com, and interactions as Discord sends them (https://discord.com/developers/docs)."""

from __future__ import annotations

import itertools
import secrets
import time
from typing import Annotated, Any, Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tooling.testing.vendors.server import Call, Refused, Reply, StandIn, encoded, read_form


class _Mentions(msgspec.Struct, forbid_unknown_fields=True):
    parse: Annotated[list[str], msgspec.Meta(max_length=0)]


class _Edit(msgspec.Struct, forbid_unknown_fields=True):
    content: Annotated[str, msgspec.Meta(min_length=1, max_length=2_000)]
    allowed_mentions: _Mentions


class _Create(_Edit, forbid_unknown_fields=True, kw_only=True):
    nonce: Annotated[str, msgspec.Meta(min_length=1, max_length=25)]
    enforce_nonce: bool


class _EditWithFile(msgspec.Struct, forbid_unknown_fields=True):
    """The text beside a file is empty."""

    content: Annotated[str, msgspec.Meta(max_length=0)]
    allowed_mentions: _Mentions


class _CreateWithFile(_EditWithFile, forbid_unknown_fields=True, kw_only=True):
    nonce: Annotated[str, msgspec.Meta(min_length=1, max_length=25)]
    enforce_nonce: bool


class _Option(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal[3, 11]
    name: Annotated[str, msgspec.Meta(pattern="^[a-z]{1,32}$")]
    description: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    required: bool


class _Command(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(pattern="^[a-z]{1,32}$")]
    description: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    options: list[_Option]


class _Application(msgspec.Struct, forbid_unknown_fields=True):
    interactions_endpoint_url: str


class DiscordStandIn(StandIn):
    """One app. `expired`: tokens of interactions that are over; `missing`: channels without access."""

    def __init__(self) -> None:
        super().__init__()
        self.application = str(secrets.randbelow(10**18) + 10**17)
        self.token = secrets.token_urlsafe(40)
        self.expired: set[str] = set()
        self.missing: set[str] = set()
        self.repeats = 0
        self._key = Ed25519PrivateKey.generate()
        self._originals: dict[str, str] = {}
        self._nonces: dict[tuple[str, str], str] = {}
        self._channels: dict[str, str] = {}
        self._ids = itertools.count(10**17)

    @property
    def credentials(self) -> dict[str, str]:
        public = self._key.public_key().public_bytes_raw().hex()
        return {"application_id": self.application, "public_key": public, "bot_token": self.token}

    def command(
        self, text: str | None = "hi", *, channel: str = "77", person: str = "42", **fields: Any
    ) -> dict[str, Any]:
        """An interaction; its token belongs to the channel."""
        token = secrets.token_urlsafe(60)
        self._channels[token] = channel
        options = [] if text is None else [{"name": "question", "type": 3, "value": text}]
        return {
            "version": 1,
            "type": 2,
            "id": str(next(self._ids)),
            "application_id": self.application,
            "token": token,
            "channel_id": channel,
            "member": {"user": {"id": person}},
            "data": {"id": "1", "name": "ask", "options": options},
            **fields,
        }

    def signed(self, payload: Any, *, age: int = 0) -> tuple[bytes, dict[str, str]]:
        """Body and headers of a call, signed `age` seconds ago: bytes as they are, any other value as JSON."""
        body = payload if isinstance(payload, bytes) else encoded(payload)
        timestamp = str(int(time.time()) - age)
        return body, {
            "content-type": "application/json",
            "x-signature-timestamp": timestamp,
            "x-signature-ed25519": self._key.sign(timestamp.encode() + body).hex(),
        }

    def handle(self, call: Call) -> Reply:
        match call.method, call.path.strip("/").split("/"):
            case "PATCH", ["api", "v10", "webhooks", self.application, token, "messages", id_]:
                return self._edit(token, id_, call)
            case "POST", ["api", "v10", "webhooks", self.application, token]:
                return self._follow_up(token, call)
            case "DELETE", ["api", "v10", "webhooks", self.application, token, "messages", id_]:
                if token in self.expired or id_ != self._originals.get(token) or not self.withdraw(id_):
                    raise Refused(Reply(404, {"code": 10008, "message": "Unknown Message"}))
                return Reply(204, None)
            case "POST", ["api", "v10", "channels", channel, "messages"]:
                return self._create(channel, call)
        if call.path.startswith("/attachments/"):
            return self.file(call.path)
        if call.headers.get("authorization") != f"Bot {self.token}":
            raise Refused(Reply(401, {"code": 0, "message": "401: Unauthorized"}))
        match call.method, call.path.strip("/").split("/"):
            case "DELETE", ["api", "v10", "channels", channel, "messages", id_]:
                if channel in self.missing:
                    raise Refused(Reply(403, {"code": 50001, "message": "Missing Access"}))
                if not self.withdraw(id_):
                    raise Refused(Reply(404, {"code": 10008, "message": "Unknown Message"}))
                return Reply(204, None)
            case "GET", ["api", "v10", "users", "@me"]:
                return Reply(200, {"id": self.application, "username": "ada"})
            case "POST", ["api", "v10", "applications", self.application, "commands"]:
                command = _decode(call, _Command)
                return Reply(201, {"id": str(next(self._ids)), "name": command.name})
            case "PATCH", ["api", "v10", "applications", "@me"]:
                self.webhook = _decode(call, _Application).interactions_endpoint_url
                return Reply(200, {"id": self.application})
        raise Refused(Reply(404, {"code": 0, "message": "404: Not Found"}))

    def _edit(self, token: str, id_: str, call: Call) -> Reply:
        channel = self._channels.get(token)
        if channel is None or token in self.expired:
            raise Refused(Reply(404, {"code": 10015, "message": "Unknown Webhook"}))
        if id_ not in ("@original", self._originals.get(token)):
            raise Refused(Reply(404, {"code": 10008, "message": "Unknown Message"}))
        edit = _decode(call, _Edit)
        if token in self._originals:
            [known] = [message for message in self.ledger if message.id == self._originals[token]]
            if known.text == edit.content:
                self.repeats += 1
            self.change(known.id, edit.content)
        else:
            self._originals[token] = str(next(self._ids))
            self.record(channel, edit.content, self._originals[token], msgspec.to_builtins(edit))
        return Reply(200, {"id": self._originals[token], "channel_id": channel, "content": edit.content})

    def _follow_up(self, token: str, call: Call) -> Reply:
        """A command that was not answered yet would get this as its answer."""
        if token not in self._originals or token in self.expired:
            raise Refused(Reply(404, {"code": 10015, "message": "Unknown Webhook"}))
        _, shown, fields = _content(call, _Edit, _EditWithFile)
        id_ = str(next(self._ids))
        self.record(self._channels[token], shown, id_, fields)
        return Reply(200, {"id": id_, "channel_id": self._channels[token]})

    def _create(self, channel: str, call: Call) -> Reply:
        if call.headers.get("authorization") != f"Bot {self.token}":
            raise Refused(Reply(401, {"code": 0, "message": "401: Unauthorized"}))
        if channel in self.missing:
            raise Refused(Reply(403, {"code": 50001, "message": "Missing Access"}))
        create, shown, fields = _content(call, _Create, _CreateWithFile)
        if (channel, create.nonce) in self._nonces:
            self.repeats += 1
        else:
            id_ = self._nonces[channel, create.nonce] = str(next(self._ids))
            self.record(channel, shown, id_, fields)
        return Reply(200, {"id": self._nonces[channel, create.nonce], "channel_id": channel, "nonce": create.nonce})


def _content(call: Call, of_text: type[Any], of_file: type[Any]) -> tuple[Any, str, dict[str, object]]:
    """The message, the text that a person sees, and the fields for the ledger."""
    if not call.headers.get("content-type", "").startswith("multipart/form-data"):
        message = _decode(call, of_text)
        return message, message.content, msgspec.to_builtins(message)
    texts, files = read_form(call)
    file = files["files[0]"]
    message = _decode(call._replace(body=texts["payload_json"].encode()), of_file)
    return message, f"[file {file.name}]", {"type": file.content_type, "content": file.content}


def _decode(call: Call, type_: type[Any]) -> Any:
    try:
        return msgspec.json.decode(call.body, type=type_)
    except msgspec.DecodeError as error:
        raise Refused(Reply(400, {"code": 50035, "message": f"Invalid Form Body: {error}"})) from error
