"""Which agent gets a message, and which messages of groups start a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import httpx
import pytest

from infra.clock import utcnow, uuid7
from infra.outgoing.client import Outgoing
from infra.security.crypto import Cipher
from services.channel.accounts.routing import Route, is_for_the_bot, routed
from services.channel.accounts.store import AccountSecrets, keep_identity, read
from services.channel.vendors import VENDORS
from services.channel.vendors.base import Groups, Request
from services.channel.vendors.items import Inbound
from services.channel.vendors.telegram import TelegramCredentials
from tests.services.channel.conftest import Desk
from tests.services.channel.vendors.conftest import Adapter, Call, keys_of
from tooling.testing.platform import MASTER_KEY
from tooling.testing.vendors import (
    FeishuStandIn,
    LineStandIn,
    QQStandIn,
    SlackStandIn,
    TeamsStandIn,
    TelegramStandIn,
    WhatsAppStandIn,
    answer,
)
from tooling.testing.vendors.server import StandIn

DEFAULT, SALES, HELP, ROOM = (uuid7() for _ in range(4))
ROUTES = (
    Route(SALES, command="Sales"),
    Route(HELP, conversation_id="C1", command="help"),
    Route(ROOM, conversation_id="C1"),
)


def message(text: str, conversation: str = "1", **fields: Any) -> Inbound:
    return Inbound(("1",), conversation, "p", "m", text, **fields)


@pytest.mark.parametrize(
    ("item", "agent", "text"),
    [
        (message("hello"), DEFAULT, "hello"),
        (message("/sales how much?"), SALES, "how much?"),
        (message(" @Sales: how\nmuch?"), SALES, "how\nmuch?"),
        (message("/sales@ada_bot how much?", "C1"), SALES, "how much?"),
        (message("/sales"), SALES, "/sales"),
        (message("/salesman hi"), DEFAULT, "/salesman hi"),
        (message("@Frag uns /sales how much?", mentions_bot=True), SALES, "how much?"),
        (message("@Frag uns /sales how much?"), DEFAULT, "@Frag uns /sales how much?"),
        # As Slack writes a mention; and two names.
        (message("<@U0BOT> /sales how much?", mentions_bot=True), SALES, "how much?"),
        (message("<@U0BOT|Frag uns>@sales how much?", mentions_bot=True), SALES, "how much?"),
        (message("@bot  @sales how much?", mentions_bot=True), SALES, "how much?"),
        (message("@sales @bot how much?", mentions_bot=True), SALES, "@bot how much?"),
        (message("/sales：多少钱", mentions_bot=True), SALES, "多少钱"),
        (message("@sales，多少钱"), SALES, "多少钱"),
        (message("<@U0BOT> /sales how much?"), DEFAULT, "<@U0BOT> /sales how much?"),
        (message("<@U0BOT> see /sales", mentions_bot=True), DEFAULT, "<@U0BOT> see /sales"),
        (message("@Ada see /sales"), DEFAULT, "@Ada see /sales"),
        (message("see /sales"), DEFAULT, "see /sales"),
        (message("/help me", "C1"), HELP, "me"),
        (message("/help me"), DEFAULT, "/help me"),
        (message("hello", "C1"), ROOM, "hello"),
        (message("hello", "C1/17", parent="C1"), ROOM, "hello"),
        (message("hello", "C12"), DEFAULT, "hello"),
    ],
)
def test_the_first_route_that_fits_names_the_agent(item: Inbound, agent: object, text: str) -> None:
    assert routed(ROUTES, DEFAULT, item) == (agent, text)


@pytest.mark.parametrize(
    ("item", "answered"),
    [
        (message("hi"), ["all", "mentions", "replies"]),
        (message("hi", in_group=True), ["all"]),
        (message("hi", in_group=True, mentions_bot=True), ["all", "mentions"]),
        (message("hi", in_group=True, replies_to_bot=True), ["all", "mentions", "replies"]),
    ],
)
def test_a_channel_chooses_which_messages_of_groups_it_answers(item: Inbound, answered: Sequence[Groups]) -> None:
    modes: tuple[Groups, ...] = ("all", "mentions", "replies")
    assert [mode for mode in modes if is_for_the_bot(mode, item)] == answered


def _telegram(**fields: object) -> Call:
    return TELEGRAM.update("😀 @Ada_Bot hi", chat=-5, **fields)  # type: ignore[arg-type]


# The calls below are signed when the tests are collected, and a call is fresh for five minutes only.
SIGNED_AT = utcnow()
TELEGRAM = TelegramStandIn()
SLACK = SlackStandIn()
TEAMS = TeamsStandIn()
FEISHU = FeishuStandIn()
LINE = LineStandIn()
QQ = QQStandIn()
WHATSAPP = WhatsAppStandIn()
FAKES: dict[str, StandIn] = {
    "telegram": TELEGRAM,
    "slack": SLACK,
    "teams": TEAMS,
    "feishu": FEISHU,
    "line": LINE,
    "qq": QQ,
    "whatsapp": WHATSAPP,
}
BOT = {"id": int(TELEGRAM.bot_token.partition(":")[0]), "is_bot": True}
GROUP = {"type": "group", "groupId": "C1", "userId": "U1"}
MENTION = {"key": "@_user_1", "name": "Ada", "mentioned_type": "bot"}


@pytest.mark.parametrize(
    ("name", "call", "told"),
    [
        ("telegram", TELEGRAM.update("hi"), (False, False, False)),
        ("telegram", _telegram(), (True, False, False)),
        ("telegram", _telegram(entities=[{"type": "mention", "offset": 3, "length": 8}]), (True, True, False)),
        ("telegram", _telegram(entities=[{"type": "mention", "offset": 0, "length": 5}]), (True, False, False)),
        ("telegram", _telegram(entities=[{"type": "bot_command", "offset": 0, "length": 2}]), (True, True, False)),
        ("telegram", _telegram(reply_to_message={"message_id": 1, "from": BOT}), (True, False, True)),
        ("telegram", _telegram(reply_to_message={"message_id": 1, "from": BOT | {"id": 1}}), (True, False, False)),
        ("slack", SLACK.event("hi", channel="D1"), (False, False, False)),
        ("slack", SLACK.event("hi", channel_type="channel"), (True, False, False)),
        ("slack", SLACK.event("<@U0BOT> hi", channel_type="channel"), (True, True, False)),
        ("slack", SLACK.event("hi", kind="app_mention"), (True, True, False)),
        ("slack", SLACK.event("hi", thread_ts="1.000001", parent_user_id="U0BOT"), (True, False, True)),
        ("slack", SLACK.event("hi", thread_ts="1.000001", parent_user_id="U2"), (True, False, False)),
        ("teams", TEAMS.signed(TEAMS.activity()), (False, False, False)),
        (
            "teams",
            TEAMS.signed(
                TEAMS.activity(
                    conversation={"id": "19:c", "conversationType": "channel"},
                    entities=[{"type": "clientInfo"}, {"type": "mention", "mentioned": {"id": f"28:{TEAMS.app_id}"}}],
                )
            ),
            (True, True, False),
        ),
        (
            "teams",
            TEAMS.signed(TEAMS.activity(conversation={"id": "19:c", "conversationType": "groupChat"})),
            (True, False, False),
        ),
        ("feishu", FEISHU.call(FEISHU.event("hi")), (False, False, False)),
        ("feishu", FEISHU.call(FEISHU.event("hi", chat_type="group")), (True, False, False)),
        ("feishu", FEISHU.call(FEISHU.event("hi", chat_type="group", mentions=[MENTION])), (True, True, False)),
        (
            "feishu",
            FEISHU.call(FEISHU.event("hi", chat_type="group", mentions=[MENTION | {"mentioned_type": "user"}])),
            (True, False, False),
        ),
        ("line", LINE.call(LINE.event("hi")), (False, False, False)),
        ("line", LINE.call(LINE.event("hi", source=GROUP)), (True, False, False)),
        (
            "line",
            LINE.call(
                LINE.event(
                    source=GROUP,
                    message={"type": "text", "id": "9", "text": "@a", "mention": {"mentionees": [{"isSelf": True}]}},
                )
            ),
            (True, True, False),
        ),
    ],
)
async def test_adapters_tell_groups_mentions_and_replies(name: str, call: Call, told: tuple[bool, bool, bool]) -> None:
    item = received(name, call)
    assert (item.in_group, item.mentions_bot, item.replies_to_bot) == told


def received(name: str, call: Call) -> Inbound:
    adapter = Adapter(name, FAKES[name], Outgoing(allow_private=True))
    [item] = adapter.vendor.receive(_with_keys(call), adapter.credentials, SIGNED_AT).items
    assert isinstance(item, Inbound)
    return item


def _of_telegram(text: str, *kinds: str, **fields: object) -> Call:
    """With an entity for each word, if it is of a kind."""
    entities, start = [], 0
    for kind, word in zip(kinds, text.split(), strict=False):
        entities.append({"type": kind, "offset": start, "length": len(word), "user": {"id": 9}})
        start += len(word) + 1
    return TELEGRAM.update(text, chat=-5, entities=entities, **fields)  # type: ignore[arg-type]


def _of_whatsapp(text: str, group_id: str | None = "G", **fields: Any) -> Call:
    return WHATSAPP.call(WHATSAPP.message(text, group_id=group_id, **fields))


def _of_teams(*persons: str, kind: str = "channel") -> Call:
    entities = [{"type": "mention", "mentioned": {"id": person}} for person in persons]
    return TEAMS.signed(TEAMS.activity(conversation={"id": "19:c", "conversationType": kind}, entities=entities))


def _of_line(*is_bot: bool) -> Call:
    mention = {"mentionees": [{"isSelf": one} for one in is_bot]}
    message = {"type": "text", "id": "9", "text": "@a yes", "mention": mention}
    return LINE.call(LINE.event(source=GROUP, message=message))


def _of_feishu(*kinds: str) -> Call:
    mentions = [MENTION | {"mentioned_type": kind} for kind in kinds]
    return FEISHU.call(FEISHU.event("@_user_1 yes", chat_type="group", mentions=mentions))


def _of_qq(*is_you: bool) -> Call:
    event = QQ.event("<@M2> yes", group="g1", mentions=[{"is_you": one} for one in is_you])
    return QQ.signed(event | {"t": "GROUP_MESSAGE_CREATE"})


@pytest.mark.parametrize(
    ("name", "call", "for_others"),
    [
        ("telegram", _of_telegram("yes"), False),
        ("telegram", _of_telegram("@bob yes", "mention"), True),
        ("telegram", _of_telegram("Bob yes", "text_mention"), True),
        ("telegram", _of_telegram("@bob @ada_bot yes", "mention", "mention"), False),
        ("telegram", _of_telegram("@other_bot yes", "mention"), True),
        ("telegram", _of_telegram("@Ada_Bot yes", "mention"), False),
        ("telegram", _of_telegram("/yes@other_bot", "bot_command"), True),
        ("telegram", _of_telegram("/yes@ada_bot", "bot_command"), False),
        ("telegram", _of_telegram("@bob yes", "mention", reply_to_message={"message_id": 1, "from": BOT}), False),
        ("slack", SLACK.event("<@UBOB> yes", channel_type="channel"), True),
        ("slack", SLACK.event("<@UBOB|bob> yes", channel_type="channel"), True),
        ("slack", SLACK.event("<@U0BOT> <@UBOB> yes", channel_type="channel"), False),
        ("slack", SLACK.event("<@UBOB> yes", kind="app_mention"), False),
        ("slack", SLACK.event("<@UBOB> yes", channel="D1"), False),
        ("teams", _of_teams("29:bob"), True),
        ("teams", _of_teams("29:bob", f"28:{TEAMS.app_id}"), False),
        ("teams", _of_teams("29:bob", kind="personal"), False),
        ("feishu", _of_feishu("user"), True),
        ("feishu", _of_feishu("user", "bot"), False),
        ("line", _of_line(False), True),
        ("line", _of_line(False, True), False),
        ("qq", _of_qq(False), True),
        ("qq", _of_qq(False, True), False),
        ("whatsapp", _of_whatsapp("yes", context={"from": "4477", "id": "wamid.x"}), True),
        ("whatsapp", _of_whatsapp("yes", context={"from": "1555", "id": "wamid.x"}), False),
        ("whatsapp", _of_whatsapp("yes", context={"from": "491", "id": "wamid.x"}, group_id=None), False),
        ("whatsapp", _of_whatsapp("@4477, yes"), True),
        ("whatsapp", _of_whatsapp("@1555 yes"), False),
        ("whatsapp", _of_whatsapp("yes"), False),
    ],
)
async def test_adapters_tell_a_message_of_a_group_that_is_for_other_persons(
    name: str, call: Call, for_others: bool
) -> None:
    assert received(name, call).for_others is for_others


@pytest.mark.parametrize(
    ("name", "call", "quotes", "root"),
    [
        ("feishu", FEISHU.call(FEISHU.event("yes", chat_type="group", root_id="om_1", parent_id="om_2")), "om_2", ""),
        ("feishu", FEISHU.call(FEISHU.event("yes", thread_id="t", root_id="om_1", parent_id="om_1")), "", "om_1"),
        ("feishu", FEISHU.call(FEISHU.event("yes", thread_id="t")), "", ""),
        ("slack", SLACK.event("yes", thread_ts="1.000001"), "", "1.000001"),
        ("slack", SLACK.event("yes"), "", ""),
    ],
)
async def test_adapters_tell_the_message_that_is_quoted_and_that_of_a_thread(
    name: str, call: Call, quotes: str, root: str
) -> None:
    item = received(name, call)
    assert (item.quotes, item.root) == (quotes, root)


def _with_keys(call: Call) -> Request:
    body, headers = call
    return Request("POST", "", headers, body, keys=keys_of(TEAMS), identity="@ada_bot")


async def change(desk: Desk, channel: dict[str, Any], **body: Any) -> httpx.Response:
    async with desk.client() as http:
        return await http.patch(f"/api/v1/channels/{channel['id']}", json=body)


async def test_a_channel_leads_to_several_agents_and_answers_mentions_only(desk: Desk) -> None:
    async with SlackStandIn() as slack:
        channel = await desk.connect("slack", slack.credentials, slack.url)
        assert (channel["routes"], channel["groups"]) == ([], "all")
        sales = {"agent_id": str(SALES), "command": "sales", "conversation_id": None}
        changed = await change(desk, channel, routes=[sales], groups="mentions")
        assert changed.status_code == 200
        assert await desk.channel(channel["id"]) == changed.json()
        assert (changed.json()["routes"], changed.json()["groups"]) == ([sales], "mentions")
        # Slack tells this mention twice. Its first event does not say who the bot is.
        unknown = slack.event("/sales how much?", channel_type="channel", ts="1.000001")
        mention = slack.event("/sales how much?", kind="app_mention", ts="1.000001")
        for call in (unknown, mention, mention, slack.event("hello", channel="D1")):
            assert (await desk.call(channel, call)).status_code == 200
        got = [(one["agent_id"], one["text"]) for one in await desk.received(channel)]
        assert sorted(got) == sorted([(str(SALES), "how much?"), (channel["agent_id"], "hello")])
        assert await desk.ignored(channel) == ["a message of a group; only mentions are answered"]


async def test_a_mention_is_accepted_by_the_last_known_name_while_telegram_is_away(desk: Desk) -> None:
    async with TelegramStandIn() as telegram:
        channel = await desk.connect("telegram", telegram.credentials, telegram.url)
        await change(desk, channel, groups="mentions")
        async with desk.client() as http:
            assert (await http.post(f"/api/v1/channels/{channel['id']}/test")).json()["identity"] == "@ada_bot"
        telegram.faults += [answer(500)] * 10
        for text in ("@bob hi", "@ada_bot hi"):
            assert (await desk.call(channel, _mentioning(telegram, text))).status_code == 200
        assert [one["text"] for one in await desk.received(channel)] == ["@ada_bot hi"]


async def test_a_name_that_is_not_known_is_read_apart_from_the_message(desk: Desk) -> None:
    async with TelegramStandIn() as telegram:
        channel = await desk.connect("telegram", telegram.credentials, telegram.url)
        await change(desk, channel, groups="mentions")
        assert (await desk.call(channel, _mentioning(telegram, "@ada_bot hi"))).status_code == 200
        assert "@ada_bot hi" in [one["text"] for one in await desk.received(channel)]

        async def is_known() -> bool:
            await desk.call(channel, _mentioning(telegram, "@bob hi"))
            return bool(await desk.ignored(channel))

        await desk.platform.until(is_known)
        async with TelegramStandIn() as other:
            # It may be another bot.
            await change(desk, channel, credentials=other.credentials)
        async with desk.platform.database("channel").begin() as tx:
            assert await tx.sql("SELECT identity FROM account WHERE id = $1", UUID(channel["id"])) == [(None,)]


def test_a_mention_may_be_of_a_bot_whose_name_is_not_known_and_its_yes_does_not_count() -> None:
    vendor, credentials = VENDORS["telegram"], TelegramCredentials(**TELEGRAM.credentials)
    for kind, text in (("mention", "@ada_bot yes"), ("bot_command", "/yes@ada_bot")):
        body, headers = _of_telegram(text, kind)
        [item] = vendor.receive(Request("POST", "", headers, body), credentials, utcnow()).items
        assert isinstance(item, Inbound)
        assert is_for_the_bot("mentions", item)
        assert item.for_others


async def test_a_name_that_was_read_with_former_credentials_is_not_kept(desk: Desk) -> None:
    async with TelegramStandIn() as former, TelegramStandIn() as current:
        channel = await desk.connect("telegram", former.credentials)
        secrets, id_ = AccountSecrets(Cipher(MASTER_KEY)), UUID(channel["id"])
        async with desk.platform.database("channel").begin(tenant_id=desk.tenant_id) as tx:
            account = await read(tx, secrets, id_)
        await change(desk, channel, credentials=current.credentials)
        async with desk.platform.database("channel").begin(tenant_id=desk.tenant_id) as tx:
            assert account
            await keep_identity(tx, secrets, account, "@former_bot")
            assert await tx.sql("SELECT identity FROM account WHERE id = $1", id_) == [(None,)]


def _mentioning(telegram: TelegramStandIn, text: str) -> Call:
    length = len(text.partition(" ")[0])
    return telegram.update(text, chat=-5, entities=[{"type": "mention", "offset": 0, "length": length}])


async def test_the_approvers_of_a_channel_go_with_each_message_to_the_agent(desk: Desk) -> None:
    async with SlackStandIn() as slack:
        channel = await desk.connect("slack", slack.credentials, slack.url)
        assert channel["approvers"] == []
        assert (await desk.call(channel, slack.event("first", channel="D1", ts="1.000001"))).status_code == 200
        await desk.received(channel)
        rule = ["person:0123456789abcdef", "chat-admins"]
        changed = await change(desk, channel, approvers=rule)
        assert changed.json()["approvers"] == rule
        assert (await desk.call(channel, slack.event("second", channel="D1", ts="2.000001"))).status_code == 200

        async def both() -> list[dict[str, Any]] | None:
            found = await desk.received(channel)
            return found if len(found) == 2 else None

        got = await desk.platform.until(both)
        assert [(one["text"], one["approvers"]) for one in got] == [("first", []), ("second", rule)]
        assert (await change(desk, channel, approvers=[])).json()["approvers"] == []


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"routes": [{"agent_id": str(SALES)}]}, "conversation_id or a command"),
        ({"routes": [{"agent_id": str(SALES), "command": "a b"}]}, "command"),
        ({"routes": [{"agent_id": "x", "command": "a"}]}, "agent_id"),
        ({"routes": [{"agent_id": str(SALES), "command": "a"}] * 51}, "routes"),
        ({"groups": "some"}, "groups"),
        ({"groups": "mentions"}, "groups: must be all for a whatsapp channel"),
        ({"approvers": ["boss"]}, "approvers[0]"),
        # A client of the API cannot write in a channel.
        ({"approvers": ["scope:admin"]}, "approvers[0]"),
        ({"approvers": ["asker", "person:a b"]}, "approvers[1]"),
        ({"approvers": ["person:a\n"]}, "approvers[0]"),
        ({"approvers": ["asker"] * 101}, "approvers"),
    ],
)
async def test_wrong_settings_are_refused_and_change_nothing(desk: Desk, body: dict[str, Any], named: str) -> None:
    async with WhatsAppStandIn() as meta:
        channel = await desk.connect("whatsapp", meta.credentials, meta.url)
        refused = await change(desk, channel, **body)
        assert refused.status_code == 422
        assert named in refused.text
        assert await desk.channel(channel["id"]) == channel
