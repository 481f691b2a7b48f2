"""Examples of Telegram, Slack, Discord and Teams."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import msgspec

from services.channel.vendors.base import Request
from services.channel.vendors.items import Deleted, Edited, Moved, Reacted, Receipt
from tests.services.channel.vendors.conftest import keys_of
from tests.services.channel.vendors.kinds import Examples, Expected, ignored, posted
from tooling.testing.vendors import (
    DiscordStandIn,
    SlackStandIn,
    TeamsStandIn,
    TelegramStandIn,
)


def telegram() -> Examples:
    fake = TelegramStandIn()
    update = msgspec.json.decode(fake.update("hi")[0])
    message = update["message"]

    def of(**fields: Any) -> dict[str, Any]:
        return {"update_id": 1, "message": {k: v for k, v in (message | {"text": None} | fields).items() if v}}

    place = {"latitude": 52.5, "longitude": 13.4}
    business = message | {"business_connection_id": "bc1"}
    checklist = {"title": "Trip", "tasks": [{"id": 1, "text": "book", "completion_date": 9}, {"id": 2, "text": "pack"}]}
    done = {"checklist_message": message | {"checklist": checklist}, "marked_as_done_task_ids": [2]}
    person = {"id": 42, "is_bot": False}
    reaction = {"chat": message["chat"], "message_id": 7, "user": person, "new_reaction": []}
    files = {name: {"file_id": "f"} for name in ("voice", "audio", "video", "video_note", "animation", "document")}
    given: dict[str, tuple[Any, Expected]] = {
        "message": (update, "hi"),
        "edited_message": ({"update_id": 1, "edited_message": message}, Edited),
        "callback_query": (
            {"update_id": 1, "callback_query": {"id": "1", "from": person, "data": "yes", "message": message}},
            "yes",
        ),
        "message_reaction": ({"update_id": 1, "message_reaction": reaction}, Reacted),
        "business_message": ({"update_id": 1, "business_message": business}, "hi"),
        "edited_business_message": ({"update_id": 1, "edited_business_message": business}, Edited),
        "deleted_business_messages": (
            {
                "update_id": 1,
                "deleted_business_messages": {
                    "business_connection_id": "bc1",
                    "chat": message["chat"],
                    "message_ids": [7],
                },
            },
            Deleted,
        ),
        "message.text": (of(text="hello"), "hello"),
        "message.caption": (of(photo=[{"file_id": "f"}], caption="what is this?"), "what is this?"),
        "message.photo": (of(photo=[{"file_id": "f"}]), ""),
        "message.live_photo": (of(live_photo={"file_id": "f"}), ""),
        **{f"message.{name}": (of(**{name: file}), "") for name, file in files.items()},
        "message.sticker": (of(sticker={"file_id": "f", "emoji": "😀"}), "[Sticker: 😀]"),
        "message.story": (
            of(story={"chat": message["chat"], "id": 1}),
            "[The person sent a story without text. Its content cannot be read here.]",
        ),
        "message.paid_media": (
            of(paid_media={"star_count": 1, "paid_media": []}),
            "[The person sent paid media without text. Its content cannot be read here.]",
        ),
        "message.location": (of(location=place), "[Location: 52.5, 13.4]"),
        "message.venue": (
            of(location=place, venue={"location": place, "title": "Café", "address": "Main St. 1"}),
            "[Location: Café, Main St. 1, 52.5, 13.4]",
        ),
        "message.contact": (
            of(contact={"phone_number": "+491", "first_name": "Ada", "last_name": "L"}),
            "[Contact: Ada L, +491]",
        ),
        "message.dice": (of(dice={"emoji": "🎲", "value": 4}), "[Dice: 🎲, 4]"),
        "message.game": (of(game={"title": "Chess", "description": "A game", "photo": []}), "[Game: Chess, A game]"),
        "message.poll": (
            of(poll={"id": "1", "question": "Where?", "options": [{"text": "Rome"}, {"text": "Oslo"}]}),
            "[Poll: Where?]\n- Rome\n- Oslo",
        ),
        "message.poll_option_added": (
            of(poll_option_added={"option_text": "Bonn"}),
            "[Option added to a poll: Bonn]",
        ),
        "message.checklist": (of(checklist=checklist), "[Checklist: Trip]\n- [x] book\n- [ ] pack"),
        "message.checklist_tasks_added": (
            of(checklist_tasks_added={"tasks": [{"id": 3, "text": "go"}]}),
            "[Tasks added to a checklist]\n- go",
        ),
        "message.checklist_tasks_done": (of(checklist_tasks_done=done), "[Tasks of a checklist: Trip]\n- [x] pack"),
        "message.web_app_data": (of(web_app_data={"data": '{"size":"L"}', "button_text": "Order"}), '{"size":"L"}'),
        "message.migrate_to_chat_id": (of(migrate_to_chat_id=-1005), Moved),
        "message.migrate_from_chat_id": (of(migrate_from_chat_id=-5), Moved),
    }
    for kind in ignored("telegram"):
        if kind not in given:
            name = kind.removeprefix("message.")
            given[kind] = (of(**{name: {"x": 1}}) if name != kind else {"update_id": 1, kind: {"id": "1"}}, None)
    return Examples(fake, lambda content: posted(fake.signed(content)), given)


def slack() -> Examples:
    fake = SlackStandIn()
    base = msgspec.json.decode(fake.event("hi")[0])

    def event(**fields: Any) -> Any:
        return base | {"event": base["event"] | fields}

    def payload(**fields: Any) -> bytes:
        given = {"user": {"id": "U1"}, "channel": {"id": "C1"}, "action_ts": "1.5", **fields}
        return urlencode({"payload": msgspec.json.encode(given).decode()}).encode()

    def request(content: Any) -> Request:
        if not isinstance(content, bytes):
            return posted(fake.signed(content))
        body, headers = fake.signed_bytes(content)
        return posted((body, headers | {"content-type": "application/x-www-form-urlencoded"}))

    item = {"type": "message", "channel": "C1", "ts": "1.000002"}
    edited = base["event"] | {"edited": {"user": "U1", "ts": "1700000009.000000"}}
    comment = {"id": "Fc1", "user": "U1", "comment": "the total is wrong"}
    given: dict[str, tuple[Any, Expected]] = {
        "message": (base, "hi"),
        "message.file_share": (event(subtype="file_share", files=[{"url_private": "https://files.slack.com/a"}]), "hi"),
        "message.file_comment": (event(subtype="file_comment", user=None, comment=comment), "the total is wrong"),
        "message.thread_broadcast": (event(subtype="thread_broadcast", thread_ts="1.000001"), "hi"),
        "message.me_message": (event(subtype="me_message"), "hi"),
        "message.message_changed": (event(subtype="message_changed", message=edited), Edited),
        "message.message_deleted": (event(subtype="message_deleted", deleted_ts="1.000002"), Deleted),
        "event.channel_id_changed": (
            event(type="channel_id_changed", old_channel_id="G1", new_channel_id="C1"),
            Moved,
        ),
        "event.app_mention": (event(type="app_mention"), "hi"),
        "event.reaction_added": (event(type="reaction_added", reaction="eyes", item=item), Reacted),
        "event.reaction_removed": (event(type="reaction_removed", reaction="eyes", item=item), Reacted),
        "interaction.block_actions": (
            payload(type="block_actions", actions=[{"selected_options": [{"value": "a"}, {"value": "b"}]}]),
            "a, b",
        ),
        "interaction.interactive_message": (
            payload(
                type="interactive_message",
                actions=[{"name": "game", "type": "select", "selected_options": [{"value": "chess"}]}],
                message_ts="1.2",
                original_message={"ts": "1.2", "text": "Which one?"},
            ),
            "chess",
        ),
        "interaction.message_action": (
            payload(type="message_action", callback_id="translate", message={"ts": "1.2", "text": "Bonjour"}),
            "translate\n\n[Forwarded message]\nBonjour",
        ),
        "command": (
            urlencode(
                {"command": "/ask", "text": "why & how?", "channel_id": "C1", "user_id": "U1", "trigger_id": "1.2"}
            ).encode(),
            "/ask why & how?",
        ),
    }
    for kind in ignored("slack"):
        place, _, name = kind.partition(".")
        if place == "interaction":
            given[kind] = payload(type=name), None
        else:
            given[kind] = event(**({"subtype": name} if place == "message" else {"type": name})), None
    return Examples(fake, request, given)


def discord() -> Examples:
    fake = DiscordStandIn()
    poll = {"question": {"text": "Where?"}, "answers": [{"poll_media": {"text": "Rome"}}]}
    message = {"content": "Bonjour", "sticker_items": [{"id": "1", "name": "wave"}], "poll": poll}
    message["message_snapshots"] = [{"message": {"content": "Ciao"}}]
    of_message = {"name": "Translate", "type": 3, "target_id": "5", "resolved": {"messages": {"5": message}}}
    of_user = {"name": "Look up", "type": 2, "target_id": "9", "resolved": {"users": {"9": {"id": "9"}}}}
    entered = [{"type": 1, "components": [{"type": 4, "custom_id": "a", "value": "too slow"}]}]
    entered.append({"type": 18, "component": {"type": 3, "values": ["x", "y"]}})
    given: dict[str, tuple[Any, Expected]] = {
        "command": (fake.command("why?"), "why?"),
        "command of a message": (
            fake.command(data=of_message),
            "/Translate\n\n[Forwarded message]\nBonjour\n[Sticker: wave]\n[Poll: Where?]\n- Rome\nCiao",
        ),
        "command of a user": (fake.command(data=of_user), "/Look up\n[User: 9]"),
        "component": (fake.command(type=3, data={"custom_id": "m", "values": ["a", "b"]}), "a, b"),
        "modal": (fake.command(type=5, data={"custom_id": "f", "components": entered}), "too slow\nx, y"),
        "autocomplete": (fake.command(type=4), None),
    }
    for kind in ignored("discord"):
        if kind.startswith("event."):
            event = {"type": kind.removeprefix("event."), "timestamp": "2026-01-01T00:00:00Z", "data": {}}
            given[kind] = {"version": 1, "application_id": "1", "type": 1, "event": event}, None
    return Examples(fake, lambda content: posted(fake.signed(content)), given)


def teams() -> Examples:
    fake = TeamsStandIn()

    def attached(kind: str, **content: Any) -> Any:
        return fake.activity("", attachments=[{"contentType": kind, "content": content}])

    at = {"timestamp": "2026-01-01T00:00:00Z"}
    body = [{"type": "TextBlock", "text": "Invoice"}, {"type": "FactSet", "facts": [{"title": "Sum", "value": "9"}]}]
    given: dict[str, tuple[Any, Expected]] = {
        "message": (fake.activity("hi"), "hi"),
        "messageUpdate": (
            fake.activity("hi", type="messageUpdate", channelData={"eventType": "editMessage"}, **at),
            Edited,
        ),
        "messageDelete": (
            fake.activity(None, type="messageDelete", channelData={"eventType": "softDeleteMessage"}),
            Deleted,
        ),
        "messageReaction": (
            fake.activity(None, type="messageReaction", replyToId="a1", reactionsAdded=[{"type": "like"}], **at),
            Reacted,
        ),
        "event.application/vnd.microsoft.readReceipt": (
            fake.activity(
                None, type="event", name="application/vnd.microsoft.readReceipt", value={"lastReadMessageId": "1"}
            ),
            Receipt,
        ),
        "invoke.adaptiveCard/action": (
            fake.activity(
                None,
                type="invoke",
                name="adaptiveCard/action",
                value={"action": {"type": "Action.Execute", "verb": "approve", "data": {"sum": 9}}},
            ),
            '{"sum":9}',
        ),
        "invoke.suggestedActions/submit": (
            fake.activity(None, type="invoke", name="suggestedActions/submit", value={"command": "retry"}),
            '{"command":"retry"}',
        ),
        "attachment.application/vnd.microsoft.teams.file.download.info": (
            attached("application/vnd.microsoft.teams.file.download.info", downloadUrl="https://x.sharepoint.com/a"),
            "",
        ),
        "attachment.image": (
            fake.activity(
                "", attachments=[{"contentType": "image/png", "contentUrl": "https://smba.trafficmanager.net/i"}]
            ),
            "",
        ),
        "attachment.messageReference": (
            fake.activity(
                "make it shorter",
                attachments=[{"contentType": "messageReference", "content": '{"messagePreview":"a &amp; b"}'}],
            ),
            "make it shorter\n\n[In reply to this message]\na & b",
        ),
        "attachment.forwardedMessageReference": (
            attached("forwardedMessageReference", originalMessageContent="<p>Bonjour</p>"),
            "[Forwarded message]\nBonjour",
        ),
        "attachment.card": (attached("application/vnd.microsoft.card.adaptive", body=body), "Invoice\nSum\n9"),
    }
    for kind in ignored("teams"):
        type_, _, name = kind.partition(".")
        given[kind] = fake.activity(None, type=type_, **({"name": name} if name else {})), None

    def request(content: Any) -> Request:
        return posted(fake.signed(content))._replace(keys=keys_of(fake))

    return Examples(fake, request, given)
