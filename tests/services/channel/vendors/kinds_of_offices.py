"""Examples of Feishu, DingTalk and WeCom."""

from __future__ import annotations

from typing import Any

import msgspec

from services.channel.vendors.base import Request, placeholder
from services.channel.vendors.items import Deleted, Reacted
from tests.services.channel.vendors.kinds import URL, Examples, Expected, ignored, posted
from tooling.testing.vendors import (
    DingTalkStandIn,
    FeishuStandIn,
    WeComStandIn,
)


def feishu() -> Examples:
    fake = FeishuStandIn()

    def of(kind: str, **content: Any) -> Any:
        return fake.event(kind=kind, content=content)

    def event(kind: str, **fields: Any) -> Any:
        made = fake.event()
        made["header"]["event_type"] = kind
        return made | {"event": fields}

    user = {"open_id": "ou_1"}
    reaction = {
        "message_id": "om_1",
        "reaction_type": {"emoji_type": "SMILE"},
        "operator_type": "user",
        "user_id": user,
        "action_time": "1700000000000",
    }
    summary = {"title": "Pay", "content": [[{"tag": "text", "text": "the invoice"}]]}
    post = {"title": "Plan", "content": [[{"tag": "text", "text": "look"}, {"tag": "img", "image_key": "img_1"}]]}
    given: dict[str, tuple[Any, Expected]] = {
        "text": (of("text", text="hi"), "hi"),
        "post": (of("post", **post), "Plan\nlook"),
        "image": (of("image", image_key="img_1"), ""),
        "file": (of("file", file_key="f_1", file_name="a.pdf"), ""),
        "folder": (of("folder", file_key="f_1", file_name="Q3"), "[Folder: Q3]"),
        "audio": (of("audio", file_key="f_1"), ""),
        "media": (of("media", file_key="f_1"), ""),
        "sticker": (of("sticker", file_key="f_1"), "[Sticker]"),
        "interactive": (
            of("interactive", title="Card", elements=[[{"tag": "text", "text": "Total 9"}]]),
            "Card\nTotal 9",
        ),
        "share_chat": (of("share_chat", chat_id="oc_9"), "[Group: oc_9]"),
        "share_user": (of("share_user", user_id="ou_9"), "[Contact: ou_9]"),
        "location": (of("location", name="Café", latitude="52.5", longitude="13.4"), "[Location: Café, 52.5, 13.4]"),
        "todo": (of("todo", task_id="t", summary=summary, due_time="17"), "[Task: Pay\nthe invoice, 17]"),
        "vote": (of("vote", topic="Where?", options=["Rome", "Oslo"]), "[Poll: Where?]\n- Rome\n- Oslo"),
        "video_chat": (of("video_chat", topic="Weekly", start_time="17"), "[Video meeting: Weekly, 17]"),
        "share_calendar_event": (
            of("share_calendar_event", summary="Lunch", start_time="1", end_time="2"),
            "[Calendar event: Lunch, 1, 2]",
        ),
        "calendar": (of("calendar", summary="Lunch", start_time="1", end_time="2"), "[Calendar event: Lunch, 1, 2]"),
        "general_calendar": (of("general_calendar", summary="Lunch"), "[Calendar event: Lunch]"),
        "hongbao": (of("hongbao", text="[红包]"), "[Red packet: [红包]]"),
        "merge_forward": (of("merge_forward", content="Merged and Forwarded Message"), ""),
        "system": (of("system", template="{from_user} added {to_chatters}"), None),
        "event.im.message.receive_v1": (fake.event("hi"), "hi"),
        "event.im.message.recalled_v1": (event("im.message.recalled_v1", message_id="om_1"), Deleted),
        "event.im.message.reaction.created_v1": (event("im.message.reaction.created_v1", **reaction), Reacted),
        "event.im.message.reaction.deleted_v1": (event("im.message.reaction.deleted_v1", **reaction), Reacted),
        "event.card.action.trigger": (
            event(
                "card.action.trigger",
                operator=user,
                action={"tag": "button", "value": {"answer": "yes"}},
                context={"open_message_id": "om_1", "open_chat_id": "oc_1"},
            ),
            '{"answer":"yes"}',
        ),
    }
    given |= {
        kind: (event(kind.removeprefix("event.")), None) for kind in ignored("feishu") if kind.startswith("event.")
    }
    return Examples(fake, lambda content: posted(fake.call(content)), given)


def dingtalk() -> Examples:
    fake = DingTalkStandIn()

    def of(kind: str, **content: Any) -> Any:
        return fake.message(None, msgtype=kind, content=content)

    records = msgspec.json.encode([{"senderNick": "Ada", "content": "Bonjour"}, {"content": "Ciao"}]).decode()
    given: dict[str, tuple[Any, Expected]] = {
        "text": (fake.message("hi"), "hi"),
        "richText": (of("richText", richText=[{"text": "look "}, {"type": "picture", "downloadCode": "d"}]), "look"),
        **{name: (of(name, downloadCode="d"), "") for name in ("picture", "video", "file")},
        "audio": (of("audio", downloadCode="d", recognition="good morning"), "good morning"),
        "chatRecord": (of("chatRecord", chatRecord=records), "[Forwarded message]\nAda: Bonjour\nCiao"),
        "location": (
            of("location", address="Main St. 1", latitude="52.5", longitude="13.4"),
            "[Location: Main St. 1, 52.5, 13.4]",
        ),
        "link": (
            of("link", title="News", text="Today", messageUrl="https://e.example"),
            "[Link: News, Today, https://e.example]",
        ),
        "markdown": (of("markdown", title="t", text="# Plan"), "# Plan"),
        "actionCard": (of("actionCard", title="Leave", text="From Monday"), "Leave\nFrom Monday"),
        **{
            name: (
                of(name),
                placeholder("a message that DingTalk does not pass on"),
            )
            for name in ("interactiveCard", "unknownMsgType")
        },
        "card.actionCallback": (fake.press({"answer": "yes"}), "yes"),
    }

    def request(content: Any) -> Request:
        is_press = isinstance(content, dict) and "outTrackId" in content
        return posted(fake.signed_press(content) if is_press else fake.signed(content))

    return Examples(fake, request, given)


def wecom() -> Examples:
    fake = WeComStandIn()

    def of(kind: str, inner: str = "", **fields: str) -> bytes:
        return fake.message(MsgType=kind, **fields).replace(b"</xml>", f"{inner}</xml>".encode())

    def request(content: bytes) -> Request:
        body, query = fake.call(content)
        return Request("POST", query, {}, body, URL)

    def event(kind: str, inner: str = "", **fields: str) -> bytes:
        return of("event", inner, Event=kind, MsgId="", **fields)

    record = "<Item><Title>Ada</Title><Content>Bonjour</Content></Item>"
    items = (
        "<SelectedItems><SelectedItem><OptionIds><OptionId>rome</OptionId></OptionIds></SelectedItem></SelectedItems>"
    )
    place = "<Location_X>52.5</Location_X><Location_Y>13.4</Location_Y><Label>Café</Label>"
    place = f"<SendLocationInfo>{place}</SendLocationInfo>"
    scan = "<ScanCodeInfo><ScanType>qrcode</ScanType><ScanResult>ticket-7</ScanResult></ScanCodeInfo>"
    given: dict[str, tuple[Any, Expected]] = {
        "text": (fake.message("hi"), "hi"),
        **{name: (of(name, MediaId="m1"), "") for name in ("image", "voice", "video", "shortvideo", "file")},
        "location": (
            of("location", Location_X="52.5", Location_Y="13.4", Label="Café"),
            "[Location: Café, 52.5, 13.4]",
        ),
        "link": (
            of("link", Title="News", Description="Today", Url="https://e.example"),
            "[Link: News, Today, https://e.example]",
        ),
        "miniprogram": (of("miniprogram", Title="Shop"), "[Link: Shop]"),
        "chatrecord": (of("chatrecord", record, Content=""), "[Forwarded message]\nAda\nBonjour"),
        "mixed": (of("mixed", record, Content=""), "[Forwarded message]\nAda\nBonjour"),
        "event.click": (event("click", EventKey="menu-1"), "menu-1"),
        "event.taskcard_click": (event("taskcard_click", EventKey="agree"), "agree"),
        "event.template_card_event": (event("template_card_event", items, EventKey="submit"), "submit, rome"),
        "event.template_card_menu_event": (event("template_card_menu_event", EventKey="more"), "more"),
        "event.scancode_push": (event("scancode_push", scan, EventKey="scan"), "scan, ticket-7"),
        "event.scancode_waitmsg": (event("scancode_waitmsg", scan, EventKey="scan"), "scan, ticket-7"),
        "event.location_select": (event("location_select", place, EventKey="where"), "where, 52.5, 13.4, Café"),
    }
    given |= {kind: (event(kind.removeprefix("event."), EventKey="x"), None) for kind in ignored("wecom")}
    return Examples(fake, request, given)
