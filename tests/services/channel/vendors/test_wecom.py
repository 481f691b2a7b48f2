"""The WeCom adapter against its fake. The handshake's example is WeCom's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import pytest

from infra.errors import EffectFailed, InvalidMessage, RetryLater, Transient, Unanswered, Unauthenticated
from infra.outgoing.client import Outgoing
from services.channel.vendors.base import AccountRefused, Request
from services.channel.vendors.items import Ignored, Inbound
from services.channel.vendors.wecom import WeCom, WeComCredentials
from tests.services.channel.vendors.conftest import Adapter
from tooling.testing.vendors import Fault, WeComStandIn, answer, cut

EXAMPLE = WeComCredentials("wx5823bf96d3bd56c7", "1", "s", "QDG6eK", "jWmYm7qr5nMoAUwZRjGtBxmz3KA1tkAj3ykkR6q2B2C")
EXAMPLE_ECHO = "P9nAzCzyDtyTWESHep1vC5X9xho/qYX3Zpb4yKa9SKld1DsH3Iyt3tP3zNdtp+4RPcs8TgAE7OaBO+FZXvnaqQ=="


@pytest.fixture
async def fake() -> AsyncIterator[WeComStandIn]:
    async with WeComStandIn() as running:
        yield running


@pytest.fixture
def wecom(fake: WeComStandIn, outgoing: Outgoing) -> Adapter:
    return Adapter("wecom", fake, outgoing)


def test_the_vendors_own_handshake_is_answered_with_the_decrypted_echo() -> None:
    query = (
        "msg_signature=5c45ff5e21c57e6ad56bac8758b79b1d9ac89fd3&timestamp=1409659589&nonce=263014780"
        f"&echostr={quote(EXAMPLE_ECHO, safe='')}"
    )
    now = datetime.fromtimestamp(1409659589, UTC)
    received = WeCom().receive(Request("GET", query, {}, b""), EXAMPLE, now)
    assert (received.items, received.ack.body) == ([], b"1616140317555161061")
    for late in (301, -301):
        with pytest.raises(Unauthenticated):
            WeCom().receive(Request("GET", query, {}, b""), EXAMPLE, now + timedelta(seconds=late))


async def test_a_message_is_read(fake: WeComStandIn, wecom: Adapter) -> None:
    body, query = fake.call(fake.message("größer 😀 <b>&", person="ada"))
    assert wecom.receive((body, {}), query=query).items == [
        Inbound(("message/ada/1",), "ada", "ada", "1", "größer 😀 <b>&"),
    ]


async def test_messages_with_one_id_of_two_people_and_buttons_of_two_cards_are_told_apart(
    fake: WeComStandIn, wecom: Adapter
) -> None:
    press = {"MsgType": "event", "Event": "template_card_event", "EventKey": "agree"}
    given = [
        *(fake.message(person=person, MsgId="7") for person in ("ada", "bob")),
        *(fake.message(**press, TaskId=card) for card in ("t1", "t2")),
    ]
    ids = []
    for content in given:
        body, query = fake.call(content)
        ids += [id_ for item in wecom.receive((body, {}), query=query).items for id_ in item.ids]
    assert len(set(ids)) == len(ids) == 4


async def test_a_changed_call_is_refused(fake: WeComStandIn, wecom: Adapter) -> None:
    body, query = fake.call(fake.message())
    start = body.index(b"<Encrypt><![CDATA[") + len(b"<Encrypt><![CDATA[")
    for at in range(start, body.index(b"]]></Encrypt>")):
        changed = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        with pytest.raises((Unauthenticated, InvalidMessage)):
            wecom.receive((changed, {}), query=query)
    parts = query.split("&")
    for n in range(3):
        for wrong in (parts[:n] + parts[n + 1 :], [*parts[:n], parts[n] + "0", *parts[n + 1 :]]):
            with pytest.raises(Unauthenticated):
                wecom.receive((body, {}), query="&".join(wrong))
    for age in (301, -301):
        body, query = fake.call(fake.message(), age=age)
        with pytest.raises(Unauthenticated):
            wecom.receive((body, {}), query=query)
    body, query = fake.call(fake.message(), receiver="another")
    with pytest.raises(Unauthenticated):
        wecom.receive((body, {}), query=query)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<xml>",
        b'<!DOCTYPE x [<!ENTITY a "b">]><xml><Encrypt>&a;</Encrypt></xml>',
        b'<?xml version="1.0" encoding="nonsense"?><xml/>',
        b"\xff\xfe",
    ],
)
async def test_a_body_that_is_not_plain_xml_is_refused(fake: WeComStandIn, wecom: Adapter, body: bytes) -> None:
    with pytest.raises((InvalidMessage, Unauthenticated)):
        wecom.receive((body, {}), query=fake.query(""))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"Content": "<!DOCTYPE html> <!-- why? --> <?php <![CDATA["}, "<!DOCTYPE html> <!-- why? --> <?php <![CDATA["),
        ({"Content": "a]]]]><![CDATA[>b"}, "a]]>b"),
        # XML does not allow them, and people paste them.
        ({"Content": "a\0\x08b\x0b\x1f\ufffe\uffffc\td"}, "abc\td"),
        ({"MsgType": "voice", "MediaId": "m", "Recognition": "spoken"}, "spoken"),
        ({"MsgType": "event", "Event": "CLICK", "EventKey": "menu"}, "menu"),
    ],
)
async def test_what_people_write_say_and_choose_is_read(
    fake: WeComStandIn, wecom: Adapter, fields: dict[str, str], text: str
) -> None:
    body, query = fake.call(b'<?xml version="1.0" encoding="UTF-8"?>\n' + fake.message(**fields))
    item = wecom.one((body, {}), query=query)
    assert isinstance(item, Inbound)
    assert (item.text, item.attachments) == (text, ())


async def test_half_a_character_loses_no_message(fake: WeComStandIn, wecom: Adapter) -> None:
    body, query = fake.call(fake.message("a?b").replace(b"?", b"\xed\xa0\xbd"))
    item = wecom.one((body, {}), query=query)
    assert isinstance(item, Inbound)
    assert item.text == "ab"


ENTITY = '<!DOCTYPE xml [<!ENTITY a "x">]>'
ENDLESS = "<![CDATA[" * 100_000


@pytest.mark.parametrize(
    "text",
    [
        f"{ENTITY}<xml><Encrypt>&a;</Encrypt></xml>",
        f"<?p <![CDATA[ ?>{ENTITY}<?p ]]> ?><xml><Encrypt>&a;</Encrypt></xml>",
        f"<!-- <![CDATA[ -->{ENTITY}<!-- ]]> --><xml><Encrypt>&a;</Encrypt></xml>",
        f'<?xml version="1.0"?>{ENTITY}<xml><Encrypt>&a;</Encrypt></xml>',
        ENDLESS,
    ],
    ids=["entity", "instruction", "comment", "after the declaration", "endless"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-be"])
@pytest.mark.timeout(20)
async def test_no_declaration_is_followed(wecom: Adapter, text: str, encoding: str) -> None:
    with pytest.raises(InvalidMessage):
        wecom.receive((text.encode(encoding), {}))


async def test_attachments_events_and_other_apps(fake: WeComStandIn, wecom: Adapter) -> None:
    body, query = fake.call(fake.message(MsgType="image", PicUrl="http://x"))
    item = wecom.one((body, {}), query=query)
    assert isinstance(item, Inbound)
    assert "a file" in item.text
    body, query = fake.call(fake.message(MsgType="voice", MediaId="m1"))
    item = wecom.one((body, {}), query=query)
    assert isinstance(item, Inbound)
    assert [(one.kind, one.ref) for one in item.attachments] == [("voice", "m1")]
    for fields in (
        {"MsgType": "event", "Event": "enter_agent"},
        {"AgentID": "7"},
        {"MsgType": "unknown"},
        {"MsgId": ""},
    ):
        body, query = fake.call(fake.message(**fields))
        assert isinstance(wecom.one((body, {}), query=query), Ignored)


async def test_a_reply_is_plain_text_with_the_duplicate_check(fake: WeComStandIn, wecom: Adapter) -> None:
    ids = [await wecom.send("**Done** [page](https://e.example)", "ada") for _ in range(2)]
    [message] = fake.ledger
    assert (ids, message.to, message.text) == ([message.id] * 2, "ada", "Done page (https://e.example)")
    assert (message.fields["agentid"], message.fields["enable_duplicate_check"]) == (1_000_002, 1)
    assert (fake.repeats, fake.refusals, len(fake.tokens)) == (1, [], 1)


async def test_an_equal_text_of_another_delivery_is_no_duplicate(fake: WeComStandIn, wecom: Adapter) -> None:
    ids = {await wecom.send("Yes.", "ada", key=key) for key in ("d1", "d2", "d1")}
    assert (fake.texts(), len(ids), fake.repeats) == (["Yes.", "Yes."], 2, 1)
    await wecom.send(wecom.vendor.split("界" * 2_000)[0], "ada")
    assert fake.refusals == []


async def test_a_token_that_ran_out_is_fetched_again_once(fake: WeComStandIn, wecom: Adapter) -> None:
    await wecom.send("one", "ada")
    fake.tokens.clear()
    await wecom.send("two", "ada")
    assert (fake.texts(), len(fake.tokens)) == (["one", "two"], 1)
    fake.secret = "rotated"
    fake.tokens.clear()
    with pytest.raises(AccountRefused):
        await wecom.send("three", "ada")


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (answer(200, {"errcode": 81013, "errmsg": "invalid user"}), EffectFailed),
        (answer(200, {"errcode": 0, "errmsg": "ok", "invaliduser": "ada"}), EffectFailed),
        (answer(200, {"errcode": 60020, "errmsg": "not allow to access from your ip"}), AccountRefused),
        (answer(200, {"errcode": 45009, "errmsg": "reach max api daily quota limit"}), RetryLater),
        (answer(200, {"errcode": -1, "errmsg": "system busy"}), Transient),
        (answer(502), Transient),
        (answer(200, "?"), Unanswered),
        (cut(accept=True), Unanswered),
    ],
)
async def test_permanent_transient_and_unknown_errors_are_distinguished(
    fake: WeComStandIn, wecom: Adapter, fault: Fault, error: type[Exception]
) -> None:
    await wecom.send("first", "ada")
    fake.faults.append(fault)
    with pytest.raises(error) as raised:
        await wecom.send("hello", "ada")
    assert type(raised.value) is error


def test_a_long_text_is_split_by_bytes(wecom: Adapter) -> None:
    parts = wecom.vendor.split("界" * 2_000)
    assert all(len(part.encode()) <= 2_048 for part in parts)
    assert "".join(parts) == "界" * 2_000
