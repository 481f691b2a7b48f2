"""A fake of api.telegram.org, and updates as Telegram sends them (https://core.telegram.org/bots/api)."""

from __future__ import annotations

import itertools
import secrets
import time
from html.parser import HTMLParser
from typing import Annotated, Literal, NoReturn

import msgspec

from tooling.testing.vendors.server import Call, Refused, Reply, StandIn, encoded, read_form


class _ReplyParameters(msgspec.Struct, forbid_unknown_fields=True):
    message_id: int
    allow_sending_without_reply: bool = False


class _SendMessage(msgspec.Struct, forbid_unknown_fields=True):
    chat_id: int | str
    text: Annotated[str, msgspec.Meta(min_length=1)]
    parse_mode: str | None = None
    message_thread_id: int | None = None
    direct_messages_topic_id: int | None = None
    reply_parameters: _ReplyParameters | None = None


class _Place(msgspec.Struct, forbid_unknown_fields=True):
    """The texts of a form with a file."""

    chat_id: int
    message_thread_id: int | None = None


class _Draft(msgspec.Struct, forbid_unknown_fields=True):
    chat_id: Annotated[int, msgspec.Meta(gt=0)]
    draft_id: Annotated[int, msgspec.Meta(gt=0, lt=2**31)]
    text: Annotated[str, msgspec.Meta(min_length=1)]
    parse_mode: str | None = None
    message_thread_id: int | None = None


class _Action(msgspec.Struct, forbid_unknown_fields=True):
    chat_id: int | str
    action: Literal["typing"]
    message_thread_id: int | None = None


class _SetWebhook(msgspec.Struct, forbid_unknown_fields=True):
    url: str
    secret_token: str
    allowed_updates: list[str]


class TelegramStandIn(StandIn):
    """One bot. `blocked`: chats whose person blocked the bot; `unknown`: chats that do not exist; `moved`: groups that
    became supergroups, with their new id; `revoked`: the token is no longer valid.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bot_token = f"{secrets.randbelow(10**9) + 10**9}:{secrets.token_urlsafe(26)}"
        self.secret_token = secrets.token_urlsafe(24)
        self.blocked: set[int] = set()
        """Chats whose person has blocked the bot."""
        self.unknown: set[int] = set()
        """Chats that do not exist."""
        self.moved: dict[int, int] = {}
        """Groups that became supergroups → their new id."""
        self.topics: set[int] = set()
        """The topics that exist. A message to another one is refused."""
        self.no_photos: set[bytes] = set()
        """Images that Telegram takes as documents only."""
        self.revoked = False
        """The token is not valid any more."""
        self._updates = itertools.count(secrets.randbelow(10**8) + 10**8)
        self._messages = itertools.count(1)

    @property
    def credentials(self) -> dict[str, str]:
        return {"bot_token": self.bot_token, "secret_token": self.secret_token}

    def update(
        self,
        text: str | None,
        *,
        chat: int = 42,
        person: int = 42,
        update_id: int | None = None,
        message_id: int | None = None,
        topic: int | None = None,
        **fields: object,
    ) -> tuple[bytes, dict[str, str]]:
        """Body and headers of a webhook call for a message; `fields` are added to it, null ones are left out."""
        message: dict[str, object] = {
            "message_id": message_id or next(self._messages),
            "from": {"id": person, "is_bot": False, "first_name": "Ada", "language_code": "en"},
            "chat": {"id": chat, "type": "private" if chat > 0 else "supergroup"},
            "date": int(time.time()),
            "text": text,
        }
        if topic is not None:
            message |= {"message_thread_id": topic, "is_topic_message": True}
        message = {name: value for name, value in (message | fields).items() if value is not None}
        return self.signed({"update_id": update_id or next(self._updates), "message": message})

    def edit(
        self, text: str, message_id: int, *, chat: int = 42, person: int = 42, update_id: int | None = None
    ) -> tuple[bytes, dict[str, str]]:
        """The call for the edit of a message."""
        body, _ = self.update(text, chat=chat, person=person, message_id=message_id, update_id=update_id)
        update = msgspec.json.decode(body)
        update["edited_message"] = update.pop("message") | {"edit_date": int(time.time())}
        return self.signed(update)

    def reaction(self, message_id: int, *signs: str, chat: int = 42, person: int = 42) -> tuple[bytes, dict[str, str]]:
        """The call for a person's reaction to a message. `signs` are all of this person now."""
        reaction = {
            "chat": {"id": chat, "type": "private" if chat > 0 else "supergroup"},
            "message_id": message_id,
            "user": {"id": person, "is_bot": False, "first_name": "Ada"},
            "date": int(time.time()),
            "old_reaction": [],
            "new_reaction": [{"type": "emoji", "emoji": sign} for sign in signs],
        }
        return self.signed({"update_id": next(self._updates), "message_reaction": reaction})

    def signed(self, update: object) -> tuple[bytes, dict[str, str]]:
        """Body and headers of a call with any update, with the secret token that Telegram adds."""
        headers = {"content-type": "application/json", "x-telegram-bot-api-secret-token": self.secret_token}
        return encoded(update), headers

    def handle(self, call: Call) -> Reply:
        if call.path.startswith(f"/file/bot{self.bot_token}/files/"):
            return self.file(call.path.rpartition("/")[2])
        token, _, method = call.path.removeprefix("/bot").partition("/")
        if self.revoked or token != self.bot_token:
            _refuse(401, "Unauthorized")
        if method == "getMe":
            return Reply(200, {"ok": True, "result": {"id": 1, "is_bot": True, "username": "ada_bot"}})
        if method == "setWebhook":
            asked = msgspec.json.decode(call.body, type=_SetWebhook)
            if asked.secret_token != self.secret_token:
                _refuse(400, "Bad Request: secret token")
            self.webhook = asked.url
            return Reply(200, {"ok": True, "result": True, "description": "Webhook was set"})
        if method == "getFile":
            id_ = msgspec.json.decode(call.body)["file_id"]
            if id_ not in self.files:
                _refuse(400, "Bad Request: file is too big")
            return Reply(200, {"ok": True, "result": {"file_id": id_, "file_path": f"files/{id_}"}})
        if method in ("sendPhoto", "sendDocument"):
            return self._file(call, method.removeprefix("send").lower())
        if method not in ("sendMessage", "sendMessageDraft", "sendChatAction"):
            _refuse(404, "Not Found")
        if call.method != "POST" or not call.headers.get("content-type", "").startswith("application/json"):
            _refuse(400, "Bad Request: message text is empty")
        try:
            if method == "sendChatAction":
                action = msgspec.json.decode(call.body, type=_Action)
                self.signs.append(str(action.chat_id))
                return Reply(200, {"ok": True, "result": True})
            if method == "sendMessageDraft":
                draft = msgspec.json.decode(call.body, type=_Draft)
                self.drafts.append((str(draft.chat_id), _shown(draft.text) if draft.parse_mode else draft.text))
                return Reply(200, {"ok": True, "result": True})
            message = msgspec.json.decode(call.body, type=_SendMessage)
        except msgspec.DecodeError as error:
            _refuse(400, f"Bad Request: {error}")
        self._check(message)
        id_ = str(next(self._messages))
        chat = str(message.chat_id) + (f"/{message.message_thread_id}" if message.message_thread_id else "")
        shown = _shown(message.text) if message.parse_mode else message.text
        self.record(chat, shown, id_, msgspec.to_builtins(message))
        result = {
            "message_id": int(id_),
            "date": int(time.time()),
            "chat": {"id": message.chat_id},
            "text": message.text,
        }
        return Reply(200, {"ok": True, "result": result})

    def _file(self, call: Call, field: str) -> Reply:
        texts, files = read_form(call)
        try:
            place = msgspec.convert(texts, _Place, strict=False)
            file = files[field]
        except (msgspec.ValidationError, KeyError) as error:
            _refuse(400, f"Bad Request: {error}")
        if field == "photo" and file.content in self.no_photos:
            _refuse(400, "Bad Request: PHOTO_INVALID_DIMENSIONS")
        self._check_place(place)
        id_ = str(next(self._messages))
        chat = str(place.chat_id) + (f"/{place.message_thread_id}" if place.message_thread_id else "")
        self.record(chat, f"[{field} {file.name}]", id_, {"type": file.content_type, "content": file.content})
        return Reply(200, {"ok": True, "result": {"message_id": int(id_), "chat": {"id": place.chat_id}}})

    def _check(self, message: _SendMessage) -> None:
        if len(message.text.encode("utf-16-le")) // 2 > 4096:
            _refuse(400, "Bad Request: message is too long")
        if not message.text.strip():
            _refuse(400, "Bad Request: message text is empty")
        if message.parse_mode not in (None, "HTML"):
            _refuse(400, "Bad Request: unsupported parse_mode")
        if message.parse_mode:
            _shown(message.text)
        self._check_place(message)

    def _check_place(self, message: _SendMessage | _Place) -> None:
        if message.message_thread_id is not None and message.message_thread_id not in self.topics:
            _refuse(400, "Bad Request: message thread not found")
        if message.chat_id in self.blocked:
            _refuse(403, "Forbidden: bot was blocked by the user")
        if message.chat_id in self.unknown:
            _refuse(400, "Bad Request: chat not found")
        if isinstance(message.chat_id, int) and (new := self.moved.get(message.chat_id)):
            _refuse(400, "Bad Request: group chat was upgraded to a supergroup chat", migrate_to_chat_id=new)


class _Html(HTMLParser):
    """The text of a message in Telegram's HTML. Refuses tags that Telegram does not know or that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("b", "i", "s", "u", "code", "pre", "a", "blockquote"):
            _refuse(400, f"Bad Request: can't parse entities: unsupported start tag {tag}")
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            _refuse(400, f"Bad Request: can't parse entities: unexpected end tag {tag}")

    def handle_data(self, data: str) -> None:
        self.text += data


def _shown(text: str) -> str:
    parser = _Html()
    parser.feed(text)
    parser.close()
    if parser.open:
        _refuse(400, f"Bad Request: can't parse entities: {parser.open[-1]} is not closed")
    if not parser.text.strip():
        _refuse(400, "Bad Request: message text is empty")
    return parser.text


def _refuse(code: int, description: str, **parameters: int) -> NoReturn:
    body: dict[str, object] = {"ok": False, "error_code": code, "description": description}
    raise Refused(Reply(code, body | ({"parameters": parameters} if parameters else {})))
