"""Discord's interactions and webhook events.

https://discord.com/developers/docs/interactions/receiving-and-responding,
https://discord.com/developers/docs/events/webhook-events
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from services.channel.events import Attachment
from services.channel.vendors.base import decode, described, forwarded, kind_of
from services.channel.vendors.items import Ack, Ignored, Inbound, Received

_PING, _COMMAND, _COMPONENT, _AUTOCOMPLETE, _MODAL = 1, 2, 3, 4, 5
STRING_OPTION, FILE_OPTION = 3, 11
# Answers to an interaction: a pong, "is thinking", no choices.
_PONG, _DEFERRED = ({"type": kind} for kind in (1, 5))
_NO_CHOICES = {"type": 8, "data": {"choices": []}}
# https://discord.com/developers/docs/topics/permissions: it has all permissions of the server.
_ADMINISTRATOR = 1 << 3
# https://discord.com/developers/docs/resources/channel#channel-object-channel-types
_THREADS = (10, 11, 12)
# Messages in a message, such as forwarded ones.
_DEPTH = 3

_NOT_OFFERED = "the bot does not offer it"
# By the type of the interaction and of the webhook event. Empty: it is read; else why it is ignored. Ordinary messages,
# with their polls and stickers, come by the Gateway only; a command of a message brings them.
KINDS: Mapping[str, str] = {
    "command": "",
    "command of a message": "",
    "command of a user": "",
    "component": "",
    "modal": "",
    "autocomplete": "there are no choices",
    "event.APPLICATION_AUTHORIZED": "no person writes it to the bot",
    "event.APPLICATION_DEAUTHORIZED": "no person writes it to the bot",
    "event.ENTITLEMENT_CREATE": _NOT_OFFERED,
    "event.ENTITLEMENT_UPDATE": _NOT_OFFERED,
    "event.ENTITLEMENT_DELETE": _NOT_OFFERED,
    "event.QUEST_USER_ENROLLMENT": _NOT_OFFERED,
    "event.LOBBY_MESSAGE_CREATE": _NOT_OFFERED,
    "event.LOBBY_MESSAGE_UPDATE": _NOT_OFFERED,
    "event.LOBBY_MESSAGE_DELETE": _NOT_OFFERED,
    "event.GAME_DIRECT_MESSAGE_CREATE": _NOT_OFFERED,
    "event.GAME_DIRECT_MESSAGE_UPDATE": _NOT_OFFERED,
    "event.GAME_DIRECT_MESSAGE_DELETE": _NOT_OFFERED,
}


class _User(msgspec.Struct):
    id: str
    username: str = ""


class _Member(msgspec.Struct):
    user: _User | None = None
    permissions: str = "0"
    """A set of bits, in decimal."""


class _File(msgspec.Struct):
    url: str
    filename: str = ""
    content_type: str | None = None


class _Named(msgspec.Struct):
    name: str | None = None


class _Words(msgspec.Struct):
    text: str | None = None
    emoji: _Named | None = None

    def __str__(self) -> str:
        return self.text or (self.emoji.name if self.emoji else "") or ""


class _Answer(msgspec.Struct):
    poll_media: _Words = msgspec.field(default_factory=_Words)


class _Poll(msgspec.Struct):
    question: _Words = msgspec.field(default_factory=_Words)
    answers: list[_Answer] = []


class _Field(msgspec.Struct):
    name: str = ""
    value: str = ""


class _Embed(msgspec.Struct):
    title: str | None = None
    description: str | None = None
    fields: list[_Field] = []

    def __str__(self) -> str:
        fields = (f"{field.name}: {field.value}" for field in self.fields)
        return "\n".join(filter(None, (self.title, self.description, *fields)))


class _Snapshot(msgspec.Struct):
    """A forwarded message."""

    message: _Message


class _Message(msgspec.Struct):
    content: str = ""
    embeds: list[_Embed] = []
    attachments: list[_File] = []
    sticker_items: list[_Named] | None = None
    poll: _Poll | None = None
    message_snapshots: list[_Snapshot] = []
    components: list[Any] = []
    """https://docs.discord.com/developers/components/reference"""


class _Resolved(msgspec.Struct):
    attachments: dict[str, _File] | None = None
    messages: dict[str, _Message] | None = None
    users: dict[str, _User] | None = None
    channels: dict[str, _Named] | None = None
    roles: dict[str, _Named] | None = None

    def name(self, id_: str) -> str:
        """The name and the id of a person, a channel or a role that was chosen; any other value as it is. A file is an
        attachment."""
        if id_ in (self.attachments or {}):
            return ""
        found = (self.channels or {}).get(id_) or (self.roles or {}).get(id_)
        user = (self.users or {}).get(id_)
        name = user.username if user else found.name if found else None
        return f"{name} ({id_})" if name else id_


class _Place(msgspec.Struct):
    type: int = 0
    parent_id: str | None = None


class _Data(msgspec.Struct):
    name: str = ""
    type: int = 1
    options: list[dict[str, Any]] | None = None
    custom_id: str = ""
    values: list[str] | None = None
    """The choices of a menu; a button has only its `custom_id`."""
    components: list[Any] | None = None
    """Of a modal."""
    target_id: str = ""
    resolved: _Resolved | None = None


class _Interaction(msgspec.Struct):
    type: int
    id: str = ""
    token: str = ""
    channel_id: str | None = None
    channel: _Place | None = None
    member: _Member | None = None
    user: _User | None = None
    data: _Data | None = None
    event: dict[str, Any] | None = None
    """Only webhook events have it; interactions do not."""


def read(body: bytes) -> Received:
    unnamed = (f"body/{hashlib.sha256(body).hexdigest()}",)
    interaction = decode(body, _Interaction)
    if interaction.event is not None or interaction.type == 0:
        kind = str((interaction.event or {}).get("type", ""))
        ignored = Ignored(unnamed, KINDS.get(f"event.{kind}") or f"a webhook event {kind[:40]}".rstrip())
        return Received([] if interaction.type == 0 else [ignored], Ack(status=204))
    if interaction.type == _PING:
        return Received([], _ack(_PONG))
    ids = (f"interaction/{interaction.id}",) if interaction.id else unnamed
    if interaction.type == _AUTOCOMPLETE:
        return Received([Ignored(ids, KINDS["autocomplete"])], _ack(_NO_CHOICES))
    if interaction.type not in (_COMMAND, _COMPONENT, _MODAL):
        return Received([Ignored(ids, f"an interaction of type {interaction.type}")])
    author = (interaction.member and interaction.member.user) or interaction.user
    if author is None or interaction.channel_id is None:
        return Received([Ignored(ids, "a command without a channel or an author")], _ack(_DEFERRED))
    data = interaction.data or _Data()
    resolved = data.resolved or _Resolved()
    files = [*(resolved.attachments or {}).values()]
    text = _text(interaction.type, data)
    if target := (resolved.messages or {}).get(data.target_id):
        words = _words(target, files, _DEPTH)
        text = forwarded(words, before=text) if words else text
    attachments = tuple(Attachment(kind_of(file.content_type or ""), file.url, file.filename) for file in files)
    parent = interaction.channel.parent_id if interaction.channel and interaction.channel.type in _THREADS else None
    item = Inbound(
        ids,
        interaction.channel_id,
        author.id,
        interaction.token,
        text,
        # A route of the channel counts for its threads.
        parent,
        attachments=attachments,
        by_admin=_is_admin(interaction.member),
        # A thread has the id of its first message.
        root=interaction.channel_id if parent else "",
    )
    return Received([item], _ack(_DEFERRED))


def _text(type_: int, data: _Data) -> str:
    resolved = data.resolved or _Resolved()
    if type_ == _COMPONENT:
        return ", ".join(map(resolved.name, data.values or ())) or data.custom_id
    if type_ == _MODAL:
        return "\n".join(filter(None, _fields(data.components, resolved))) or data.custom_id
    options = list(_options(data.options))
    first = next((n for n, (_, kind, _) in enumerate(options) if kind == STRING_OPTION), None)
    text = "" if first is None else options[first][2]
    others = [f"{name}: {resolved.name(value)}" for n, (name, _, value) in enumerate(options) if n != first]
    user = (resolved.users or {}).get(data.target_id)
    if user:
        others.append(described("User", user.username, user.id))
    return "\n".join([text or f"/{data.name}", *others])


def _options(options: Sequence[Any] | None) -> Iterator[tuple[str, int, str]]:
    """Name, type and value of the options, also those of subcommands. Files are attachments."""
    for option in options or ():
        if not isinstance(option, dict):
            continue
        kind, value = option.get("type"), option.get("value")
        if isinstance(value, str | int | float) and isinstance(kind, int) and kind != FILE_OPTION:
            yield str(option.get("name", "")), kind, str(value)
        if isinstance(nested := option.get("options"), list):
            yield from _options(nested)


def _fields(components: Any, resolved: _Resolved) -> Iterator[str]:
    """The values that a person has entered or chosen in a modal."""
    for component in components if isinstance(components, list) else ():
        if not isinstance(component, dict):
            continue
        if isinstance(value := component.get("value"), str) and value:
            yield value
        elif isinstance(value, bool):
            yield f"{component.get('custom_id')}: {value}"
        if isinstance(values := component.get("values"), list):
            yield ", ".join(filter(None, (resolved.name(str(value)) for value in values)))
        yield from _fields(component.get("components"), resolved)
        yield from _fields([component.get("component")], resolved)


def _words(message: _Message, files: list[_File], depth: int) -> str:
    """The words of a message, of its poll, stickers and embeds, and of those that it forwards. Adds its files to
    `files`."""
    files += message.attachments
    lines = [message.content, *map(str, message.embeds), *_shown(message.components, files)]
    lines += [described("Sticker", sticker.name) for sticker in message.sticker_items or ()]
    if poll := message.poll:
        lines += [described("Poll", poll.question), *(f"- {one.poll_media}" for one in poll.answers)]
    if depth:
        lines += [_words(one.message, files, depth - 1) for one in message.message_snapshots]
    return "\n".join(filter(None, lines))


def _shown(components: Any, files: list[_File]) -> Iterator[str]:
    """The texts of a message that is made of components. Adds their files to `files`."""
    for component in components if isinstance(components, list) else ():
        if not isinstance(component, dict):
            continue
        if isinstance(text := component.get("content"), str):
            yield text
        media = component.get("file") or component.get("media")
        if isinstance(media, dict) and isinstance(url := media.get("url"), str):
            type_ = media.get("content_type")
            files.append(_File(url, str(component.get("name") or ""), type_ if isinstance(type_, str) else None))
        for inner in ("components", "items"):
            yield from _shown(component.get(inner), files)
        yield from _shown([component.get("accessory")], files)


def _is_admin(member: _Member | None) -> bool:
    bits = member.permissions if member else ""
    return bits.isascii() and bits.isdecimal() and len(bits) <= 30 and bool(int(bits) & _ADMINISTRATOR)


def _ack(answer: dict[str, Any]) -> Ack:
    return Ack(msgspec.json.encode(answer), "application/json")
