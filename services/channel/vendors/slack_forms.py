"""Slack's commands and interactions, which arrive as forms: https://docs.slack.dev/interactivity"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from services.channel.vendors.base import decode, forwarded
from services.channel.vendors.items import Ignored, Inbound
from services.channel.vendors.slack_events import Content, attachments, joined, words
from services.channel.vendors.slack_kinds import KINDS


class _Named(msgspec.Struct):
    id: str


class _Label(msgspec.Struct):
    text: str = ""


class _Option(msgspec.Struct):
    value: str = ""
    text: _Label | None = None

    def __str__(self) -> str:
        return self.value or (self.text.text if self.text else "")


class _Action(msgspec.Struct):
    """The value that a person pressed, chose or entered. https://docs.slack.dev/reference/block-kit/block-elements"""

    action_id: str = ""
    name: str = ""
    """Of a button of an attachment, in place of `action_id`."""
    action_ts: str = ""
    value: str | None = None
    text: _Label | None = None
    selected_option: _Option | None = None
    selected_options: list[_Option] | None = None
    selected_date: str | None = None
    selected_time: str | None = None
    selected_date_time: int | None = None
    """Unix seconds."""
    selected_user: str | None = None
    selected_users: list[str] | None = None
    selected_conversation: str | None = None
    selected_conversations: list[str] | None = None
    selected_channel: str | None = None
    selected_channels: list[str] | None = None
    rich_text_value: Any = None

    def choices(self) -> Iterator[str]:
        one = (self.value, self.selected_option, self.selected_date, self.selected_time, self.selected_date_time)
        for chosen in (*one, self.selected_user, self.selected_conversation, self.selected_channel):
            if chosen is not None:
                yield str(chosen)
        several = (self.selected_options, self.selected_users, self.selected_conversations, self.selected_channels)
        for group in several:
            yield from map(str, group or ())
        if typed := joined([self.rich_text_value]):
            yield typed

    def __str__(self) -> str:
        return ", ".join(self.choices()) or (self.text.text if self.text else "") or self.action_id or self.name


class _Message(Content):
    """The message with the button, or the one that a shortcut is about."""

    ts: str = ""
    thread_ts: str | None = None


class _Container(msgspec.Struct):
    """The place of the message. If only one person sees it, its content is not told."""

    thread_ts: str | None = None


class _State(msgspec.Struct):
    """The inputs of the message, by block and action."""

    values: dict[str, dict[str, _Action]] = {}


class _Interaction(msgspec.Struct):
    """The form's field ``payload``."""

    type: str
    user: _Named | None = None
    channel: _Named | None = None
    message: _Message | None = None
    original_message: _Message | None = None
    """In place of `message`, if the button is of an attachment."""
    container: _Container | None = None
    actions: list[_Action] | None = None
    state: _State | None = None
    callback_id: str = ""
    action_ts: str = ""


def read(body: bytes) -> Inbound | Ignored:
    """A button, a choice, a command or a shortcut, as a message."""
    fields = dict(parse_qsl(body.decode("utf-8", "replace")))
    unnamed = (f"body/{hashlib.sha256(body).hexdigest()}",)
    if "payload" not in fields:
        return _command(unnamed, fields)
    given = decode(fields["payload"].encode(), _Interaction)
    reason = KINDS.get(f"interaction.{given.type}", f"an interaction {given.type[:40]}")
    if reason or not given.user or not given.channel:
        return Ignored(unnamed, reason or "an interaction without a channel or an author")
    person, channel = given.user.id, given.channel.id
    if given.type in ("block_actions", "interactive_message") and given.actions:
        pressed = given.actions[0]
        time = pressed.action_ts or given.action_ts
        text = "\n".join([str(pressed), *_entered(given.state or _State(), pressed.action_id)])
    elif given.type == "message_action" and given.message:
        time, text = given.action_ts, forwarded(words(given.message), before=given.callback_id)
    else:
        return Ignored(unnamed, "an interaction without a choice")
    # Without a time, all of a person's shortcuts would be repeats of the first one.
    return _item((f"action/{channel}/{person}/{time}",) if time else unnamed, given, person, channel, text)


def _entered(state: _State, pressed: str) -> Iterator[str]:
    """A line for each input of the message that has a value, without the one that was pressed."""
    for inputs in state.values.values():
        for name, action in inputs.items():
            if name != pressed and (value := ", ".join(action.choices())):
                yield f"{name}: {value}"


def _command(unnamed: tuple[str, ...], fields: dict[str, str]) -> Inbound | Ignored:
    """https://docs.slack.dev/interactivity/implementing-slash-commands"""
    command, channel, person = fields.get("command"), fields.get("channel_id"), fields.get("user_id")
    if not command or not channel or not person:
        return Ignored(unnamed, "a form that is neither a command nor an interaction")
    return Inbound(
        (f"command/{fields['trigger_id']}",) if fields.get("trigger_id") else unnamed,
        channel,
        person,
        "",
        f"{command} {fields.get('text', '')}".strip(),
        in_group=not channel.startswith("D"),
        mentions_bot=True,
        replies_to_bot=True,
    )


def _item(ids: tuple[str, ...], given: _Interaction, person: str, channel: str, text: str) -> Inbound:
    unseen = _Message(thread_ts=given.container.thread_ts if given.container else None)
    message = given.message or given.original_message or unseen
    thread = f"/{message.thread_ts}" if message.thread_ts else ""
    return Inbound(
        ids,
        f"{channel}{thread}",
        person,
        message.ts,
        text,
        channel if thread else None,
        attachments=attachments(message) if given.type == "message_action" else (),
        in_group=not channel.startswith("D"),
        mentions_bot=True,
        replies_to_bot=True,
        root=message.thread_ts or "",
    )
