"""Slack's events: https://docs.slack.dev/reference/events/message"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from services.channel.events import Attachment
from services.channel.vendors.base import UnreadableCall, decode, described, forwarded, kind_of, placeholder
from services.channel.vendors.items import Change, Deleted, Edited, Ignored, Inbound, Moved, Reacted
from services.channel.vendors.slack_kinds import KINDS

# https://docs.slack.dev/messaging/formatting-message-text#links-in-retrieved-messages
# Of a file that Slack Connect shares, the event tells the id only.
BY_ID = "id/"
_MENTION = re.compile(r"<@([^<>|]+)[|>]")
_TOKEN = re.compile(r"<((?:https?|mailto|tel):[^|<>\s]+|[#!][^|<>]+)(?:\|([^<>]*))?>")
_EVERYBODY = ("!here", "!channel", "!everyone")


# Elements of rich text by their type: the field with the name, and the signs around it.
_MARKS = {
    "user": ("user_id", "<@", ">"),
    "usergroup": ("usergroup_id", "<!subteam^", ">"),
    "channel": ("channel_id", "<#", ">"),
    "broadcast": ("range", "@", ""),
    "emoji": ("name", ":", ":"),
    "color": ("value", "", ""),
}
_LINES = ("section", "header", "rich_text_section", "rich_text_quote", "rich_text_preformatted")


class _Authorization(msgspec.Struct):
    user_id: str | None = None
    is_bot: bool = False


class Payload(msgspec.Struct):
    type: str
    challenge: str | None = None
    team_id: str | None = None
    event_id: str | None = None
    event: msgspec.Raw = msgspec.Raw(b"{}")
    authorizations: list[_Authorization] | None = None


class _Kind(msgspec.Struct):
    type: str = ""
    subtype: str | None = None
    bot_id: str | None = None
    user: Any = None
    """An object in events about a person."""


class SlackFile(msgspec.Struct):
    id: str | None = None
    file_access: str | None = None
    name: str | None = None
    title: str | None = None
    mimetype: str | None = None
    url_private: str | None = None


class _Field(msgspec.Struct):
    title: str = ""
    value: str = ""


class _Attachment(msgspec.Struct):
    """A forwarded message, or a preview."""

    text: str | None = None
    fallback: str | None = None
    pretext: str | None = None
    title: str | None = None
    fields: list[_Field] | None = None
    blocks: list[Any] | None = None
    files: list[SlackFile] | None = None
    is_share: bool | None = None
    """The message was forwarded."""
    is_msg_unfurl: bool | None = None
    """The text has a link to the message."""


class Content(msgspec.Struct):
    """The content of a message. In `text`, ``& < >`` are entities."""

    text: str | None = None
    files: list[SlackFile] | None = None
    attachments: list[_Attachment] | None = None
    blocks: list[Any] | None = None


class _Event(Content, kw_only=True):
    """A message event."""

    channel: str
    ts: str
    user: str
    thread_ts: str | None = None
    channel_type: str | None = None
    parent_user_id: str | None = None
    """Who began the thread."""


class _Comment(msgspec.Struct):
    user: str
    comment: str = ""


class _FileComment(msgspec.Struct):
    comment: _Comment | None = None


class _Changed(msgspec.Struct):
    channel: str
    message: msgspec.Raw
    """As it is now."""


class _Edit(msgspec.Struct):
    ts: str


class _Tombstone(msgspec.Struct):
    ts: str


class _Deletion(msgspec.Struct):
    channel: str
    deleted_ts: str
    previous_message: _Kind | None = None


class _Item(msgspec.Struct):
    type: str = ""
    channel: str = ""
    ts: str = ""


class _Reaction(msgspec.Struct):
    type: str
    user: str
    reaction: str
    item: _Item
    event_ts: str


class _NewId(msgspec.Struct):
    old_channel_id: str
    new_channel_id: str


def event(payload: Payload) -> Inbound | Change | Moved | Ignored:
    kind = decode(payload.event, _Kind)
    ids = (f"event/{payload.event_id}",)
    if kind.type in ("reaction_added", "reaction_removed"):
        return _reacted(ids, payload)
    if kind.type == "channel_id_changed":
        # A private channel is shared with another workspace.
        changed = decode(payload.event, _NewId)
        return Moved(ids, changed.old_channel_id, changed.new_channel_id)
    if kind.type not in ("message", "app_mention"):
        return Ignored(ids, KINDS.get(f"event.{kind.type}") or f"an event {kind.type[:40]}")
    if kind.subtype == "message_changed":
        return _changed(ids, payload)
    if kind.subtype == "message_deleted":
        deleted = decode(payload.event, _Deletion)
        if deleted.previous_message and deleted.previous_message.bot_id:
            return Ignored(ids, "a bot's message")
        return Deleted(ids, _target(payload, deleted.channel, deleted.deleted_ts))
    if kind.subtype == "file_comment":
        return _commented(ids, payload)
    return _spoken(ids, kind, payload, payload.event)


def _commented(ids: tuple[str, ...], payload: Payload) -> Inbound | Ignored:
    """A comment on a file, as a message of its author."""
    given = decode(payload.event, _FileComment)
    if given.comment is None:
        return Ignored(ids, "a comment without a text")
    fields = decode(payload.event, dict[str, msgspec.Raw])
    fields["user"] = msgspec.Raw(msgspec.json.encode(given.comment.user))
    fields["text"] = msgspec.Raw(msgspec.json.encode(given.comment.comment))
    raw = msgspec.Raw(msgspec.json.encode(fields))
    return _spoken(ids, _Kind("message", user=given.comment.user), payload, raw)


def _target(payload: Payload, channel: str, ts: str) -> str:
    """An id of each message. Without the workspace: a channel that several share has one id in all of them."""
    return f"message/{channel}/{ts}"


def _order(ts: str) -> int:
    """A time such as ``1700000000.000100``, in microseconds."""
    seconds, _, micros = ts.partition(".")
    if not (seconds.isdecimal() and micros.isdecimal() and len(seconds) <= 12 and len(micros) == 6 and ts.isascii()):
        raise UnreadableCall("ts: is not a time")
    return int(seconds + micros)


def _changed(ids: tuple[str, ...], payload: Payload) -> Inbound | Change | Ignored:
    """An edit. A deleted message with answers in its thread becomes a tombstone; without ``edited`` Slack itself has
    changed the message, such as by the preview of a link."""
    change = decode(payload.event, _Changed)
    kind = decode(change.message, _Kind)
    if kind.subtype == "tombstone":
        return Deleted(ids, _target(payload, change.channel, decode(change.message, _Tombstone).ts))
    fields = decode(change.message, dict[str, msgspec.Raw])
    if "edited" not in fields:
        return Ignored(ids, "a change that no person made")
    edited = decode(fields["edited"], _Edit)
    fields["channel"] = msgspec.Raw(msgspec.json.encode(change.channel))
    item = _spoken(ids, kind, payload, msgspec.Raw(msgspec.json.encode(fields)))
    return item if isinstance(item, Ignored) else Edited(ids, item.ids[1], item, _order(edited.ts))


def _reacted(ids: tuple[str, ...], payload: Payload) -> Reacted | Ignored:
    reaction = decode(payload.event, _Reaction)
    item = reaction.item
    if item.type != "message":
        return Ignored(ids, f"a reaction to a {item.type[:40]}")
    mode: Literal["added", "removed"] = "added" if reaction.type == "reaction_added" else "removed"
    target, order = _target(payload, item.channel, item.ts), _order(reaction.event_ts)
    return Reacted(ids, target, item.ts, reaction.user, (f":{reaction.reaction}:",), mode, order)


def _spoken(ids: tuple[str, ...], kind: _Kind, payload: Payload, raw: msgspec.Raw) -> Inbound | Ignored:
    if kind.bot_id is not None or kind.subtype == "bot_message":
        return Ignored(ids, "a bot's message")
    if reason := KINDS.get(f"message.{kind.subtype}" if kind.subtype else "message", "a message of an unknown kind"):
        return Ignored(ids, reason)
    if not kind.user:
        return Ignored(ids, "a message without an author")
    if kind.user == "USLACKBOT":
        return Ignored(ids, "a message of Slack itself")
    event = decode(raw, _Event)
    bots = {bot.user_id for bot in payload.authorizations or () if bot.is_bot and bot.user_id}
    if event.user in bots:
        return Ignored(ids, "a bot's message")
    mentioned = set(_MENTION.findall(event.text or ""))
    # A change of the message that began a thread names the thread, too.
    thread = f"/{event.thread_ts}" if event.thread_ts and event.thread_ts != event.ts else ""
    return Inbound(
        # A mention in a channel arrives as two events, app_mention and message, with one text.
        ids=(*ids, _target(payload, event.channel, event.ts)),
        conversation=f"{event.channel}{thread}",
        person=event.user,
        message=event.ts,
        text=words(event),
        # A thread begins with a message of the channel, or with the bot's answer there.
        parent=event.channel if thread else None,
        attachments=attachments(event),
        # An app_mention does not have the type of its channel. The id of a direct message begins with D.
        in_group=event.channel_type != "im" and not event.channel.startswith("D"),
        mentions_bot=kind.type == "app_mention" or bool(mentioned & bots),
        replies_to_bot=event.parent_user_id in bots,
        names_others=bool(mentioned - bots),
        root=thread.removeprefix("/"),
    )


def words(content: Content) -> str:
    """The text of a message, as a person wrote it."""
    return _TOKEN.sub(_typed, _text(content)).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def _text(content: Content) -> str:
    """The text may stand in attachments or blocks, too, or there are only files. Beside a text, other attachments are
    previews of its links."""
    text = content.text if content.text and content.text.strip() else ""
    blocks = content.blocks or ()
    own = [text, joined(_tables(blocks) if text else blocks)]
    shared = []
    for one in content.attachments or ():
        if one.is_share or one.is_msg_unfurl:
            shared.append(_attached(one))
        else:
            own.append(joined(_tables(one.blocks or ())) if text else _attached(one))
    lost = [file.name or file.title or "" for file in _files(content) if not _ref(file)]
    said = "\n".join(filter(None, own))
    if quoted := "\n".join(filter(None, shared)):
        said = forwarded(quoted, before=said)
    if lost and said:
        return f"{said}\n\n{described('A file that cannot be read here', *lost)}"
    if said or attachments(content):
        return said
    return placeholder("a file", *lost) if lost else placeholder("a message of a form that is not known here")


def _attached(one: _Attachment) -> str:
    parts = (one.pretext, one.title, one.text, *(f"{field.title}: {field.value}" for field in one.fields or ()))
    said = "\n".join(filter(None, parts)) or joined(one.blocks or ())
    # Of a message with files only, it has the author's name.
    return said or ("" if one.files else one.fallback or "")


def _tables(blocks: Sequence[Any]) -> list[Any]:
    return [block for block in blocks if isinstance(block, dict) and block.get("type") == "table"]


def joined(blocks: Sequence[Any]) -> str:
    return "".join(_block_texts(list(blocks))).strip()


def _typed(token: re.Match[str]) -> str:
    """A link, channel, group or time as a person wrote it: Slack marks every address, also one that was typed without a
    scheme."""
    target, label = token[1], token[2]
    if target in _EVERYBODY:
        return f"@{target[1:]}"
    if target[0] in "#!":
        # Without a label the id is all that is known.
        return f"{'#' * (target[0] == '#')}{label}" if label else f"<{target}>"
    if not label or target.endswith(label):
        return label or target
    return f"{label} ({target})"


def attachments(content: Content) -> tuple[Attachment, ...]:
    return tuple(
        Attachment(kind_of(file.mimetype or ""), ref, file.name or file.title or "")
        for file in _files(content)
        if (ref := _ref(file))
    )


def _files(content: Content) -> list[SlackFile]:
    """Also those of forwarded messages."""
    return [*(content.files or ()), *(file for one in content.attachments or () for file in one.files or ())]


def _ref(file: SlackFile) -> str:
    by_id = f"{BY_ID}{file.id}" if file.id and file.file_access == "check_file_info" else ""
    return file.url_private or by_id


def _block_texts(node: Any) -> Iterator[str]:
    """The texts in blocks, in their order."""
    if isinstance(node, list):
        for child in node:
            yield from _block_texts(child)
    elif isinstance(node, dict):
        text, kind = node.get("text") or node.get("url") or node.get("fallback"), node.get("type")
        if kind == "link" and isinstance(url := node.get("url"), str) and text != url:
            yield f"{text} ({url})"
        elif isinstance(text, str):
            yield text
        elif kind in _MARKS:
            name, before, after = _MARKS[kind]
            yield f"{before}{node.get(name)}{after}"
        else:
            yield from _block_texts(text)
        yield from _block_texts(node.get("elements"))
        for part in _listed(node.get("fields")):
            yield "\n"
            yield from _block_texts(part)
        for row in _listed(node.get("rows")):
            yield " | ".join("".join(_block_texts(cell)).strip() for cell in _listed(row)) + "\n"
        yield "\n" if kind in _LINES else ""


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
