"""Activities of the Bot Framework: https://learn.microsoft.com/microsoftteams/platform/bots/how-to/conversations"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from html import unescape
from typing import Any, Literal

import msgspec

from protos.messages.channel import FORWARDED, IN_REPLY
from services.channel.events import Attachment
from services.channel.vendors.base import UnreadableCall, described, forwarded, from_json, kind_of, placeholder, quoting
from services.channel.vendors.items import Deleted, Edited, Ignored, Inbound, Item, Reacted, Receipt

_FILE_INFO = "application/vnd.microsoft.teams.file.download.info"
_READ = "application/vnd.microsoft.readReceipt"
_NO_MESSAGE = "no person writes it to the bot"
_NOT_OFFERED = "the bot does not offer it"
# By the type of the activity, the name of an invoke, and the type of an attachment. Empty: it is read; else why it is
# ignored. https://learn.microsoft.com/microsoftteams/platform/bots/how-to/conversations/subscribe-to-conversation-events
KINDS: Mapping[str, str] = {
    "message": "",
    "messageUpdate": "",
    "messageDelete": "",
    "messageReaction": "",
    "event." + _READ: "",
    "conversationUpdate": _NO_MESSAGE,
    "installationUpdate": _NO_MESSAGE,
    "contactRelationUpdate": _NO_MESSAGE,
    "typing": _NO_MESSAGE,
    "endOfConversation": _NO_MESSAGE,
    "invoke.adaptiveCard/action": "",
    "invoke.suggestedActions/submit": "",
    "invoke.actionableMessage/executeAction": _NOT_OFFERED,
    "invoke.composeExtension/query": _NOT_OFFERED,
    "invoke.composeExtension/submitAction": _NOT_OFFERED,
    "invoke.composeExtension/fetchTask": _NOT_OFFERED,
    "invoke.composeExtension/queryLink": _NOT_OFFERED,
    "invoke.task/fetch": _NOT_OFFERED,
    "invoke.task/submit": _NOT_OFFERED,
    "invoke.fileConsent/invoke": _NOT_OFFERED,
    "invoke.message/submitAction": _NOT_OFFERED,
    "invoke.signin/verifyState": _NOT_OFFERED,
    "invoke.signin/tokenExchange": _NOT_OFFERED,
    "invoke.application/search": _NOT_OFFERED,
    "invoke.handoff/action": _NOT_OFFERED,
    "attachment." + _FILE_INFO: "",
    "attachment.image": "",
    "attachment.messageReference": "",
    "attachment.forwardedMessageReference": "",
    "attachment.card": "",
}
_QUOTATIONS = {"messageReference": IN_REPLY, "forwardedMessageReference": FORWARDED}
# The ids of bots begin with it.
_BOT = "28:"
_QUOTED = re.compile(r"<quoted[^<>]*>\s*")
# In a copy as HTML: a message that is quoted or forwarded, and the id of its author.
_PART = re.compile(r"<blockquote\s[^<>]*schema\.skype\.com/(Reply|Forward)[^<>]*>")
_AUTHOR = re.compile(r'itemprop="mri"\s+itemid="([^"<>]*)"')
_NAME = re.compile(r"<(at|span)\s[^<>]*>[^<]*</\1>\s*")
_TAG = re.compile("<[^<>]*>")
_LINE_END = re.compile(r"<(?:br\s*/?|/p|/div|/tr|/li)>", re.IGNORECASE)
_HREF = re.compile(r'<a\s[^<>]*?href="(https?://[^"<>]+)"')
# Without another < inside: otherwise each of many would search the whole rest for its end.
_MENTION = re.compile(r"(<at[^<>]*>([^<]*)</at>)(?:\s|&nbsp;)*")


class _Account(msgspec.Struct):
    id: str
    role: str | None = None


class _Conversation(msgspec.Struct):
    id: str
    tenantId: str | None = None
    conversationType: str | None = None


class _Tenant(msgspec.Struct):
    id: str = ""


class _ChannelData(msgspec.Struct):
    tenant: _Tenant | None = None
    """Also told in the conversations that do not name it themselves."""


class _QuotedReply(msgspec.Struct):
    senderId: str = ""
    preview: str = ""


class _Entity(msgspec.Struct):
    text: str | None = None
    mentioned: _Account | None = None
    quotedReply: _QuotedReply | None = None
    """A message that the person quotes. In the text stands a mark of it."""


class _Sign(msgspec.Struct):
    type: str


class _Attachment(msgspec.Struct):
    contentType: str = ""
    name: str | None = None
    contentUrl: str | None = None
    content: Any = None


class Activity(msgspec.Struct):
    type: str
    id: str = ""
    name: str = ""
    """Of an event."""
    serviceUrl: str = ""
    channelId: str = ""
    text: str | None = None
    from_: _Account | None = msgspec.field(name="from", default=None)
    recipient: _Account | None = None
    conversation: _Conversation | None = None
    channelData: _ChannelData | None = None
    attachments: list[_Attachment] | None = None
    entities: list[_Entity] | None = None
    timestamp: datetime | None = None
    replyToId: str = ""
    """Of a reaction: the message that it is about."""
    reactionsAdded: list[_Sign] = []
    reactionsRemoved: list[_Sign] = []
    value: Any = None
    """The values that a card submits after a button was pressed."""


def read(activity: Activity, tenant: str) -> Sequence[Item]:
    """The items of an activity. `tenant`: whose messages are accepted; empty: every tenant's."""
    match activity.type:
        case "message":
            return [_spoken(activity, tenant)]
        case "messageUpdate":
            message = _spoken(activity, tenant)
            if isinstance(message, Ignored):
                return [message]
            order = _order(activity)
            return [Edited((f"update/{message.ids[0]}/{order}",), message.ids[0], message, order)]
        case "messageDelete" if activity.id and activity.conversation:
            target = _target(activity, activity.id)
            return [Deleted((f"deletion/{target}",), target)]
        case "messageReaction" if activity.id and activity.conversation and activity.from_ and activity.replyToId:
            return [*_reacted(activity, "added"), *_reacted(activity, "removed")]
        case "invoke" if activity.name in ("adaptiveCard/action", "suggestedActions/submit"):
            if isinstance(activity.value, dict) and activity.value.get("trigger") == "automatic":
                return [Ignored((f"activity/{activity.id}",), "a card that refreshes itself")]
            return [_spoken(activity, tenant)]
        case "event" if activity.name == _READ and isinstance(activity.value, dict):
            # https://learn.microsoft.com/microsoftteams/platform/bots/how-to/conversations/conversation-messages
            last = str(activity.value.get("lastReadMessageId", ""))[:200]
            return [Receipt((f"activity/{activity.id}", f"read/{last}"), last, "read")]
    kind = f"{activity.type}.{activity.name}" if activity.name else activity.type
    reason = KINDS.get(kind) or KINDS.get(activity.type) or f"an activity {kind[:60]}"
    return [Ignored((f"activity/{activity.id}",), reason)]


def _target(activity: Activity, id_: str) -> str:
    """An id of each message."""
    assert activity.conversation
    return f"activity/{activity.conversation.id}/{id_}"


def _order(activity: Activity) -> int:
    if activity.timestamp is None:
        raise UnreadableCall("timestamp: is missing")
    return round(activity.timestamp.timestamp() * 1_000)


def _reacted(activity: Activity, mode: Literal["added", "removed"]) -> Sequence[Reacted]:
    """Teams tells reactions to messages of the bot."""
    assert activity.conversation
    assert activity.from_
    given = activity.reactionsAdded if mode == "added" else activity.reactionsRemoved
    signs = tuple(sign.type for sign in given)
    if not signs:
        return []
    ids = (f"reaction/{activity.conversation.id}/{activity.id}/{mode}",)
    target, author = _target(activity, activity.replyToId), activity.from_.id
    order, conversation = _order(activity), activity.conversation.id
    return [Reacted(ids, target, activity.replyToId, author, signs, mode, order, conversation)]


def _spoken(activity: Activity, tenant: str) -> Inbound | Ignored:
    ids = (f"activity/{activity.id}",)
    if not activity.id or activity.from_ is None or activity.conversation is None:
        raise UnreadableCall("a message without id, author or conversation")
    if activity.from_.role == "bot" or activity.from_.id.startswith(_BOT):
        return Ignored(ids, "a bot's message")
    told = activity.channelData.tenant if activity.channelData else None
    if tenant and tenant != (activity.conversation.tenantId or (told and told.id)):
        return Ignored(ids, "a message of another tenant")
    text = _addressed(activity)
    # A copy of the text as HTML is an attachment, too.
    copies = [str(one.content) for one in activity.attachments or () if one.contentType == "text/html"]
    own, quoted, kind = _parted(copies[0]) if copies else ("", "", "")
    if kind == "Forward":
        text = forwarded(_plain(quoted.replace("</strong>", "\n", 1)), before=_plain(own))
    elif copies and not text:
        text = _plain(copies[0])
    words = _own_words(activity, _plain(_NAME.sub("", own)) if kind == "Reply" else text, quoted)
    hidden = [url for copy in copies for url in map(unescape, _HREF.findall(copy)) if url not in text]
    if hidden:
        text = f"{text}\n\n{described('Links', *dict.fromkeys(hidden))}"
    files = [one for one in activity.attachments or () if one.contentType != "text/html"]
    attachments = tuple(filter(None, map(_attachment, files)))
    replies = (quoting("", one.quotedReply.preview) for one in activity.entities or () if one.quotedReply)
    quotations = list(filter(None, (*replies, *map(_quotation, files))))
    text = "\n\n".join(filter(None, (text, *quotations)))
    if files and not attachments and not quotations:
        named = [one.name or "" for one in files]
        lost = described("A file that cannot be read here", *named)
        text = f"{text}\n\n{lost}" if text else placeholder("a file", *named)
    # The values of a card come without a text, or beside the one of its button.
    pressed = not files and activity.value is not None
    if pressed:
        text = "\n".join(filter(None, (text, _submitted(activity.value))))
    mentioned = {one.mentioned.id for one in activity.entities or () if one.mentioned}
    recipient = {activity.recipient.id} if activity.recipient else set()
    return Inbound(
        (_target(activity, activity.id),),
        activity.conversation.id,
        activity.from_.id,
        # A reply cannot quote an invoke.
        f"{activity.id if activity.type != 'invoke' else ''} {activity.serviceUrl}",
        text,
        # A route of the channel counts for its threads.
        activity.conversation.id.rpartition(";messageid=")[0] or None,
        attachments=attachments,
        in_group=activity.conversation.conversationType in ("groupChat", "channel"),
        # A button stands under a message of the bot.
        mentions_bot=pressed or bool(mentioned & recipient),
        replies_to_bot=pressed,
        words=words,
        names_others=bool(mentioned - recipient),
    )


def _parted(html: str) -> tuple[str, str, str]:
    """HTML without the message that it quotes or forwards, that message, and which of both."""
    found = _PART.search(html)
    if not found:
        return html, "", ""
    part, _, rest = html[found.end() :].partition("</blockquote>")
    return html[: found.start()] + rest, part, found[1]


def _own_words(activity: Activity, words: str, quoted: str) -> str:
    """The words, if they stand beside a quotation and no person has written the quoted message."""
    replies = [one.quotedReply for one in activity.entities or () if one.quotedReply]
    authors = [reply.senderId for reply in replies]
    if quoted:
        authors += _AUTHOR.findall(quoted)[:1] or [""]
    for file in activity.attachments or ():
        if file.contentType == "messageReference":
            sender = _content(file).get("messageSender")
            authors.append("person" if isinstance(sender, dict) and sender.get("user") else "")
    return words if authors and all(author.startswith(_BOT) or not author for author in authors) else ""


def _addressed(activity: Activity) -> str:
    """The text without the mentions of the bot. Those of others keep their names."""
    recipient = activity.recipient.id if activity.recipient else ""
    entities = activity.entities or ()
    others = {one.text for one in entities if one.text and one.mentioned and one.mentioned.id != recipient}
    text = _MENTION.sub(lambda at: f"{at[2]} " if at[1] in others else "", activity.text or "")
    return _QUOTED.sub("", text).replace("&nbsp;", " ").strip()


def _plain(html: str) -> str:
    cells = _LINE_END.sub("\n", html).replace("</td>", " | ").replace("</th>", " | ")
    return unescape(_TAG.sub("", cells)).strip()


def _submitted(value: Any) -> str:
    """The values that a card submits. Action.Execute wraps them."""
    if isinstance(value, dict) and isinstance(action := value.get("action"), dict):
        value = action.get("data") or action.get("verb") or action
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _quotation(file: _Attachment) -> str:
    """The words of a quoted or forwarded message, or of a card."""
    content = _content(file)
    if title := _QUOTATIONS.get(file.contentType):
        words = content.get("messagePreview") or content.get("originalMessageContent") or ""
        return f"{title}\n{_plain(str(words))}" if words else ""
    if file.contentType.startswith("application/vnd.microsoft.card."):
        return "\n".join(_card_texts(content))
    return ""


def _content(file: _Attachment) -> dict[str, Any]:
    """The content of an attachment, which may be JSON in a text; empty if there is none."""
    content = file.content
    if isinstance(content, str):
        try:
            content = from_json(content)
        except (msgspec.DecodeError, RecursionError):
            return {}
    return content if isinstance(content, dict) else {}


def _card_texts(node: Any) -> Iterator[str]:
    """The texts of a card, in their order."""
    if isinstance(node, list):
        for child in node:
            yield from [child] if isinstance(child, str) else _card_texts(child)
    elif isinstance(node, dict):
        for name in ("title", "subtitle", "text", "value"):
            if isinstance(text := node.get(name), str) and text:
                yield text
        for name in ("body", "items", "columns", "facts", "inlines", "rows", "cells"):
            yield from _card_texts(node.get(name))


def _attachment(file: _Attachment) -> Attachment | None:
    """A file of a chat has an address that needs no token; an image in a text has one that does."""
    content = file.content if isinstance(file.content, dict) else {}
    if file.contentType == _FILE_INFO and isinstance(url := content.get("downloadUrl"), str):
        return Attachment("file", f"open {url}", file.name or "")
    if file.contentType.startswith(("image/", "audio/", "video/")) and file.contentUrl:
        return Attachment(kind_of(file.contentType), f"token {file.contentUrl}", file.name or "")
    return None
