"""The kinds of Telegram's updates and messages: https://core.telegram.org/bots/api#message"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from services.channel.vendors.base import described, from_json, placeholder

_ABOUT_THE_CHAT = "a notice about the chat"
_NOT_OFFERED = "the bot does not offer it"
_NOBODY = "no person writes it to the bot"
_GIVEAWAY = "a giveaway"
_PAYMENT = "a notice about a payment"

# By the field of the update, then by the field of the message. Empty: it is read; else why it is ignored.
KINDS: Mapping[str, str] = {
    "message": "",
    "edited_message": "",
    "callback_query": "",
    "message_reaction": "",
    "business_message": "",
    "edited_business_message": "",
    "deleted_business_messages": "",
    "business_connection": _NOBODY,
    "channel_post": "a post of a channel",
    "edited_channel_post": "a post of a channel",
    "message_reaction_count": "reactions without their authors",
    "inline_query": _NOT_OFFERED,
    "chosen_inline_result": _NOT_OFFERED,
    "guest_message": _NOT_OFFERED,
    "managed_bot": _NOT_OFFERED,
    "shipping_query": _NOT_OFFERED,
    "pre_checkout_query": _NOT_OFFERED,
    "purchased_paid_media": _NOT_OFFERED,
    "poll": "votes in a poll, without their chat",
    "poll_answer": "a vote in a poll, without its chat",
    "my_chat_member": _ABOUT_THE_CHAT,
    "chat_member": _ABOUT_THE_CHAT,
    "chat_join_request": _ABOUT_THE_CHAT,
    "chat_boost": _ABOUT_THE_CHAT,
    "removed_chat_boost": _ABOUT_THE_CHAT,
    "message.text": "",
    "message.caption": "",
    "message.photo": "",
    "message.live_photo": "",
    "message.video": "",
    "message.video_note": "",
    "message.voice": "",
    "message.audio": "",
    "message.animation": "",
    "message.document": "",
    "message.sticker": "",
    "message.story": "",
    "message.paid_media": "",
    "message.location": "",
    "message.venue": "",
    "message.contact": "",
    "message.dice": "",
    "message.game": "",
    "message.poll": "",
    "message.poll_option_added": "",
    "message.checklist": "",
    "message.checklist_tasks_added": "",
    "message.checklist_tasks_done": "",
    "message.web_app_data": "",
    "message.migrate_to_chat_id": "",
    "message.migrate_from_chat_id": "",
    "message.users_shared": _NOT_OFFERED,
    "message.chat_shared": _NOT_OFFERED,
    "message.passport_data": _NOT_OFFERED,
    "message.write_access_allowed": _NOT_OFFERED,
    "message.connected_website": _NOT_OFFERED,
    "message.managed_bot_created": _NOT_OFFERED,
    "message.invoice": _PAYMENT,
    "message.successful_payment": _PAYMENT,
    "message.refunded_payment": _PAYMENT,
    "message.paid_message_price_changed": _PAYMENT,
    "message.direct_message_price_changed": _PAYMENT,
    "message.gift": _PAYMENT,
    "message.unique_gift": _PAYMENT,
    "message.gift_upgrade_sent": _PAYMENT,
    "message.giveaway": _GIVEAWAY,
    "message.giveaway_created": _GIVEAWAY,
    "message.giveaway_completed": _GIVEAWAY,
    "message.giveaway_winners": _GIVEAWAY,
    **dict.fromkeys(
        [
            f"message.{name}"
            for name in (
                "boost_added",
                "channel_chat_created",
                "chat_background_set",
                "chat_owner_changed",
                "chat_owner_left",
                "delete_chat_photo",
                "forum_topic_closed",
                "forum_topic_created",
                "forum_topic_edited",
                "forum_topic_reopened",
                "general_forum_topic_hidden",
                "general_forum_topic_unhidden",
                "group_chat_created",
                "left_chat_member",
                "message_auto_delete_timer_changed",
                "new_chat_members",
                "new_chat_photo",
                "new_chat_title",
                "pinned_message",
                "poll_option_deleted",
                "proximity_alert_triggered",
                "suggested_post_approval_failed",
                "suggested_post_approved",
                "suggested_post_declined",
                "suggested_post_paid",
                "suggested_post_refunded",
                "supergroup_chat_created",
                "video_chat_ended",
                "video_chat_participants_invited",
                "video_chat_scheduled",
                "video_chat_started",
            )
        ],
        _ABOUT_THE_CHAT,
    ),
}


class _Text(msgspec.Struct):
    text: str = ""


class _Contact(msgspec.Struct):
    phone_number: str = ""
    first_name: str = ""
    last_name: str = ""


class _Location(msgspec.Struct):
    latitude: float
    longitude: float


class _Venue(msgspec.Struct):
    location: _Location
    title: str = ""
    address: str = ""


class _Dice(msgspec.Struct):
    emoji: str = ""
    value: int = 0


class _Game(msgspec.Struct):
    title: str = ""
    description: str = ""
    text: str = ""


class _Sticker(msgspec.Struct):
    emoji: str = ""


class _Poll(msgspec.Struct):
    question: str = ""
    options: list[_Text] = []


class _PollOption(msgspec.Struct):
    option_text: str = ""


class _Task(msgspec.Struct):
    id: int = 0
    text: str = ""
    completion_date: int = 0


class _Checklist(msgspec.Struct):
    title: str = ""
    tasks: list[_Task] = []


class _Listed(msgspec.Struct):
    checklist: _Checklist | None = None


class _Done(msgspec.Struct):
    checklist_message: _Listed | None = None
    marked_as_done_task_ids: list[int] = []
    marked_as_not_done_task_ids: list[int] = []


class _Added(msgspec.Struct):
    tasks: list[_Task] = []


class _WebApp(msgspec.Struct):
    data: str = ""


def words(fields: Mapping[str, msgspec.Raw]) -> str | None:
    """The text for a message that has none, from its `fields`; None if there is nothing to read."""
    for field, read in _READERS.items():
        if field in fields:
            try:
                return read(fields[field])
            except msgspec.DecodeError:
                return placeholder(f"a message of kind {field}")
    return None


def why_ignored(fields: Mapping[str, msgspec.Raw]) -> str:
    """The reason for a message that is not read."""
    known = [reason for field in fields if (reason := KINDS.get(f"message.{field}"))]
    return known[0] if known else "a message of an unknown kind"


def _location(raw: msgspec.Raw) -> str:
    place = from_json(raw, _Location)
    return described("Location", place.latitude, place.longitude)


def _venue(raw: msgspec.Raw) -> str:
    venue = from_json(raw, _Venue)
    return described("Location", venue.title, venue.address, venue.location.latitude, venue.location.longitude)


def _contact(raw: msgspec.Raw) -> str:
    contact = from_json(raw, _Contact)
    return described("Contact", f"{contact.first_name} {contact.last_name}".strip(), contact.phone_number)


def _dice(raw: msgspec.Raw) -> str:
    dice = from_json(raw, _Dice)
    return described("Dice", dice.emoji, dice.value)


def _game(raw: msgspec.Raw) -> str:
    game = from_json(raw, _Game)
    return described("Game", game.title, game.description, game.text)


def _sticker(raw: msgspec.Raw) -> str:
    return described("Sticker", from_json(raw, _Sticker).emoji)


def _poll(raw: msgspec.Raw) -> str:
    poll = from_json(raw, _Poll)
    return "\n".join([described("Poll", poll.question), *(f"- {option.text}" for option in poll.options)])


def _option(raw: msgspec.Raw) -> str:
    return described("Option added to a poll", from_json(raw, _PollOption).option_text)


def _checklist(raw: msgspec.Raw) -> str:
    list_ = from_json(raw, _Checklist)
    tasks = (f"- [{'x' if task.completion_date else ' '}] {task.text}" for task in list_.tasks)
    return "\n".join([described("Checklist", list_.title), *tasks])


def _tasks_added(raw: msgspec.Raw) -> str:
    tasks = from_json(raw, _Added).tasks
    return "\n".join([described("Tasks added to a checklist"), *(f"- {task.text}" for task in tasks)])


def _tasks_done(raw: msgspec.Raw) -> str:
    done = from_json(raw, _Done)
    list_ = (done.checklist_message and done.checklist_message.checklist) or _Checklist()
    names = {task.id: task.text for task in list_.tasks}
    marked = {"x": done.marked_as_done_task_ids, " ": done.marked_as_not_done_task_ids}
    tasks = (f"- [{mark}] {names.get(id_, f'task {id_}')}" for mark, ids in marked.items() for id_ in ids)
    return "\n".join([described("Tasks of a checklist", list_.title), *tasks])


def _web_app(raw: msgspec.Raw) -> str:
    return from_json(raw, _WebApp).data


# A message with a venue has the field location, too. A file is among them if its content cannot be found.
_READERS: Mapping[str, Callable[[msgspec.Raw], str]] = {
    "venue": _venue,
    "location": _location,
    "contact": _contact,
    "dice": _dice,
    "game": _game,
    "sticker": _sticker,
    "poll": _poll,
    "poll_option_added": _option,
    "checklist": _checklist,
    "checklist_tasks_added": _tasks_added,
    "checklist_tasks_done": _tasks_done,
    "web_app_data": _web_app,
    "story": lambda _: placeholder("a story"),
    "paid_media": lambda _: placeholder("paid media"),
    "photo": lambda _: placeholder("a photo"),
    "live_photo": lambda _: placeholder("a live photo"),
    "video": lambda _: placeholder("a video"),
    "video_note": lambda _: placeholder("a video message"),
    "voice": lambda _: placeholder("a voice message"),
    "audio": lambda _: placeholder("an audio file"),
    "animation": lambda _: placeholder("an animation"),
    "document": lambda _: placeholder("a file"),
}
