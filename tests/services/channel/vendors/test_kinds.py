"""Each kind of message and event that a vendor documents is read, or ignored for the reason of the vendor's table."""

from __future__ import annotations

from copy import deepcopy
from functools import reduce
from operator import getitem
from typing import Any

import pytest
import telegram

from infra.clock import utcnow
from services.channel.vendors import VENDORS
from services.channel.vendors.items import Ignored, Inbound
from tests.services.channel.vendors.examples import examples

KINDS = [(name, kind) for name, vendor in sorted(VENDORS.items()) for kind in vendor.kinds]
# Fields that describe a message and do not belong to its content.
_ABOUT_A_MESSAGE = {
    "author_signature",
    "business_connection_id",
    "caption_entities",
    "chat",
    "date",
    "direct_messages_topic",
    "edit_date",
    "effect_id",
    "entities",
    "external_reply",
    "forward_origin",
    "from_user",
    "guest_bot_caller_chat",
    "guest_bot_caller_user",
    "guest_query_id",
    "has_media_spoiler",
    "has_protected_content",
    "is_automatic_forward",
    "is_from_offline",
    "is_paid_post",
    "is_topic_message",
    "link_preview_options",
    "media_group_id",
    "message_id",
    "message_thread_id",
    "paid_star_count",
    "quote",
    "reply_markup",
    "reply_to_checklist_task_id",
    "reply_to_message",
    "reply_to_poll_option_id",
    "reply_to_story",
    "sender_boost_count",
    "sender_business_bot",
    "sender_chat",
    "sender_tag",
    "show_caption_above_media",
    "suggested_post_info",
    "via_bot",
}


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_each_kind_is_read_or_ignored_with_its_reason(name: str, kind: str, made: dict[str, Any]) -> None:
    fake, request, given = made[name]
    content, expected = given[kind]
    settings = {"reply_url": "http://127.0.0.1:9/"} if name == "webhook" else {}
    credentials = VENDORS[name].credentials(**{**fake.credentials, **settings})
    received = VENDORS[name].receive(request(content), credentials, utcnow())
    [item] = received.items
    if expected is None:
        assert isinstance(item, Ignored)
        assert item.reason == VENDORS[name].kinds[kind]
    elif isinstance(expected, str):
        assert isinstance(item, Inbound)
        assert item.text == expected
        assert item.text or item.attachments
    else:
        assert isinstance(item, expected)
    assert 200 <= received.ack.status < 300


WHATSAPP = ("entry", 0, "changes", 0, "value", "messages", 0)


@pytest.mark.parametrize(
    ("name", "kind", "place"),
    [
        ("telegram", "message", ("message", "from", "is_bot")),
        ("slack", "message", ("authorizations", 0, "is_bot")),
        ("teams", "message", ("replyToId",)),
        ("teams", "message", ("reactionsAdded",)),
        ("whatsapp", "text", (*WHATSAPP, "group_id")),
        ("whatsapp", "location", (*WHATSAPP, "location", "name")),
        ("whatsapp", "image", (*WHATSAPP, "image", "mime_type")),
        ("line", "sticker", ("events", 0, "message", "keywords")),
        ("feishu", "text", ("event", "message", "chat_type")),
    ],
)
def test_a_field_that_may_be_missing_may_be_null(
    name: str, kind: str, place: tuple[Any, ...], made: dict[str, Any]
) -> None:
    fake, request, given = made[name]
    content = deepcopy(given[kind][0])
    *path, field = place
    reduce(getitem, path, content)[field] = None
    [item] = VENDORS[name].receive(request(content), VENDORS[name].credentials(**fake.credentials), utcnow()).items
    assert isinstance(item, Inbound)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("whatsapp", {"image", "video", "document"}),
        ("feishu", {"image", "media", "file"}),
        ("dingtalk", {"picture", "video", "file"}),
        ("wecom", {"image", "video", "file"}),
    ],
)
def test_files_of_vendors_that_do_not_mark_albums_may_be_parts_of_one(
    name: str, files: set[str], made: dict[str, Any]
) -> None:
    fake, request, given = made[name]
    credentials = VENDORS[name].credentials(**fake.credentials)
    found = set()
    for kind, (content, _) in given.items():
        for item in VENDORS[name].receive(request(content), credentials, utcnow()).items:
            if isinstance(item, Inbound) and item.in_album:
                found.add(kind)
    assert found == files


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return examples()


def test_the_tables_have_all_kinds_that_python_telegram_bot_knows() -> None:
    kinds = VENDORS["telegram"].kinds
    assert {str(kind) for kind in telegram.Update.ALL_TYPES} == {kind for kind in kinds if "." not in kind}
    fields = {name for name in telegram.Message.__slots__ if not name.startswith("_")} - _ABOUT_A_MESSAGE
    assert {f"message.{name}" for name in fields} == {kind for kind in kinds if "." in kind}
