"""The Teams adapter against its fake."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from infra.clock import utcnow
from infra.errors import EffectFailed, InvalidMessage, RetryLater, Transient, Unanswered, Unauthenticated
from infra.outgoing.client import Outgoing
from services.channel.vendors import teams as module
from services.channel.vendors.base import AccountRefused, Request, UnreadableCall
from services.channel.vendors.items import Deleted, Edited, Ignored, Inbound, Receipt, Received
from tests.services.channel.vendors.conftest import Adapter, Call
from tooling.testing.vendors import Fault, TeamsStandIn, answer, cut
from tooling.testing.vendors.teams import SERVICE

CONVERSATION = "19:c@thread.tacv2;messageid=1"


def html(content: str) -> dict[str, str]:
    return {"contentType": "text/html", "content": content}


@pytest.fixture
async def fake() -> AsyncIterator[TeamsStandIn]:
    async with TeamsStandIn() as running:
        yield running


@pytest.fixture
def teams(fake: TeamsStandIn, outgoing: Outgoing) -> Adapter:
    adapter = Adapter("teams", fake, outgoing)
    assert isinstance(adapter.vendor, module.Teams)
    # The keys are cached by address, and this fake may have the port of an earlier one.
    adapter.vendor._published.clear()
    return adapter


async def receive(teams: Adapter, call: Call) -> Received:
    body, headers = call
    request = Request("POST", "", headers, body)
    keys = await teams.vendor.keys(teams.outgoing, teams.fake.url, teams.credentials, request)
    return teams.vendor.receive(request._replace(keys=keys), teams.credentials, utcnow())


async def test_a_message_is_read_without_its_mention(fake: TeamsStandIn, teams: Adapter) -> None:
    for n in (1, 2):
        received = await receive(teams, fake.signed(fake.activity("<at>Bot</at> größer 😀")))
        [item] = received.items
        name, channel = f"activity/{CONVERSATION}/a{n}", CONVERSATION.partition(";")[0]
        # A route of the channel counts for its threads.
        assert item == Inbound((name,), CONVERSATION, "29:1", f"a{n} {SERVICE}", "größer 😀", channel)
    # The keys are cached.
    assert fake.reads == 1


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": "https://evil.example"},
        {"iss": None},
        {"aud": "another app"},
        {"aud": None},
        {"exp": int(time.time()) - 400},
        {"exp": None},
        {"nbf": int(time.time()) + 4_000},
        {"serviceurl": "https://evil.example/"},
        {"serviceurl": None},
    ],
)
async def test_a_token_with_another_claim_is_refused(
    fake: TeamsStandIn, teams: Adapter, claims: dict[str, object]
) -> None:
    with pytest.raises(Unauthenticated):
        await receive(teams, fake.signed(fake.activity(), **claims))


def blockquote(kind: str, author: str) -> dict[str, str]:
    return html(
        f'<div><blockquote itemscope itemtype="http://schema.skype.com/{kind}" itemid="17"><strong itemprop="mri" '
        f'itemid="{author}">Bot</strong><span itemprop="time" itemid="17"></span><p itemprop="preview">May I?</p>'
        '</blockquote><p><at id="0">Claw Bot</at> yes</p></div>'
    )


def reference(**sender: object) -> dict[str, str]:
    content = {"messageId": "17", "messagePreview": "May I?", "messageSender": sender}
    return {"contentType": "messageReference", "content": msgspec.json.encode(content).decode()}


REPLY = "[In reply to this message]\nMay I?"
MARK = '<quoted messageId="17"/> yes'


@pytest.mark.parametrize(
    ("fields", "text", "words"),
    [
        ({"text": "yes", "attachments": [reference(application={"id": "b"})]}, f"yes\n\n{REPLY}", "yes"),
        ({"text": "yes", "attachments": [reference(user={"id": "u"})]}, f"yes\n\n{REPLY}", ""),
        ({"text": "Bot\nMay I?\n\nyes", "attachments": [blockquote("Reply", "28:b")]}, "Bot\nMay I?\n\nyes", "yes"),
        ({"text": "Bot\nMay I?\n\nyes", "attachments": [blockquote("Reply", "8:u")]}, "Bot\nMay I?\n\nyes", ""),
        (
            {"text": MARK, "entities": [{"quotedReply": {"senderId": "28:b", "preview": "May I?"}}]},
            f"yes\n\n{REPLY}",
            "yes",
        ),
        (
            {"text": MARK, "entities": [{"quotedReply": {"senderId": "29:u", "preview": "May I?"}}]},
            f"yes\n\n{REPLY}",
            "",
        ),
        # A forwarded yes is not the person's.
        (
            {"text": "", "attachments": [blockquote("Forward", "8:u")]},
            "Claw Bot yes\n\n[Forwarded message]\nBot\nMay I?",
            "",
        ),
        ({"text": "yes", "attachments": [html("<p>yes</p>")]}, "yes", ""),
    ],
)
async def test_beside_a_quotation_of_the_bot_the_persons_own_words_are_told_apart(
    fake: TeamsStandIn, teams: Adapter, fields: dict[str, object], text: str, words: str
) -> None:
    [item] = (await receive(teams, fake.signed(fake.activity() | fields))).items
    assert isinstance(item, Inbound)
    assert (item.text, item.words) == (text, words)


async def test_a_changed_missing_or_unsigned_token_is_refused(fake: TeamsStandIn, teams: Adapter) -> None:
    body, headers = fake.signed(fake.activity())
    head, claims, signature = headers["authorization"].removeprefix("Bearer ").split(".")
    unsigned = base64.urlsafe_b64encode(b'{"alg":"none","typ":"JWT"}').rstrip(b"=").decode()
    other = TeamsStandIn()
    for wrong in (
        "",
        "Bearer",
        "Bearer x",
        f"Basic {head}.{claims}.{signature}",
        f"Bearer {unsigned}.{claims}.",
        f"Bearer {head}.{claims}.{signature[:-8]}AAAAAAAA",
        f"Bearer {head}.{claims}A.{signature}",
        other.signed(fake.activity(), aud=fake.app_id)[1]["authorization"],
    ):
        with pytest.raises(Unauthenticated):
            await receive(teams, (body, headers | {"authorization": wrong}))
    with pytest.raises(Unauthenticated):
        await receive(teams, (body.replace(b"emea", b"evil"), headers))


async def test_a_rotated_key_is_read_again_but_not_for_each_forged_call(
    fake: TeamsStandIn, teams: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    await receive(teams, fake.signed(fake.activity()))
    fake.rotate()
    for _ in range(3):
        with pytest.raises(Unauthenticated):
            await receive(teams, fake.signed(fake.activity()))
    assert fake.reads == 1
    monkeypatch.setattr(module, "_UNKNOWN_SECONDS", 0.0)
    assert len((await receive(teams, fake.signed(fake.activity()))).items) == 1
    assert fake.reads == 2


async def test_calls_of_the_same_moment_read_the_keys_together(fake: TeamsStandIn, teams: Adapter) -> None:
    received = await asyncio.gather(*(receive(teams, fake.signed(fake.activity())) for _ in range(20)))
    assert all(one.items for one in received)
    assert fake.reads == 1


async def test_unreadable_keys_are_transient(fake: TeamsStandIn, teams: Adapter) -> None:
    large = {"jwks_uri": "https://login.example/v1/keys", "x": "x" * 300_000}
    for fault in (answer(500), answer(404, "x"), answer(200, "x"), answer(200, large)):
        fake.faults.append(fault)
        with pytest.raises(Transient):
            await receive(teams, fake.signed(fake.activity()))


async def test_edits_deletions_and_reactions_name_their_message(fake: TeamsStandIn, teams: Adapter) -> None:
    at = "2026-01-01T00:00:01.25Z"
    taken, edited, deleted = [
        (await receive(teams, fake.signed(fake.activity(type=kind, id="17", timestamp=at)))).items
        for kind in ("message", "messageUpdate", "messageDelete")
    ]
    assert isinstance(taken[0], Inbound)
    target, order = taken[0].ids[0], 1_767_225_601_250
    assert edited == [Edited((f"update/{target}/{order}",), target, taken[0], order)]
    assert deleted == [Deleted((f"deletion/{target}",), target)]
    reaction = fake.activity(
        type="messageReaction",
        id="18",
        replyToId="17",
        timestamp=at,
        reactionsAdded=[{"type": "like"}],
        reactionsRemoved=[{"type": "heart"}],
        text=None,
    )
    items = (await receive(teams, fake.signed(reaction))).items
    conversation = taken[0].conversation
    assert [item[1:] for item in items] == [
        (target, "17", "29:1", (sign,), mode, order, conversation)
        for sign, mode in (("like", "added"), ("heart", "removed"))
    ]
    assert len({item.ids for item in items}) == 2
    with pytest.raises(UnreadableCall):
        await receive(teams, fake.signed(fake.activity(type="messageUpdate")))


async def test_a_receipt_names_the_last_message_that_was_read(fake: TeamsStandIn, teams: Adapter) -> None:
    read = fake.activity(
        type="event",
        name="application/vnd.microsoft.readReceipt",
        id="f:9",
        value={"lastReadMessageId": "17"},
        text=None,
    )
    [item] = (await receive(teams, fake.signed(read))).items
    assert item == Receipt(("activity/f:9", "read/17"), "17", "read")
    for other in ({"name": "other"}, {"value": "17"}):
        [item] = (await receive(teams, fake.signed(read | other))).items
        assert isinstance(item, Ignored)


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "conversationUpdate"},
        {"type": "messageReaction"},
        {"type": "messageDelete", "conversation": None},
        {"type": "messageUpdate", "from": {"id": "28:x", "role": "bot"}},
        {"from": {"id": "28:x"}},
        {"type": "invoke", "name": "adaptiveCard/action", "value": {"trigger": "automatic"}},
    ],
)
async def test_bots_and_other_activities_are_ignored(
    fake: TeamsStandIn, teams: Adapter, fields: dict[str, Any]
) -> None:
    [item] = (await receive(teams, fake.signed(fake.activity(**fields)))).items
    assert isinstance(item, Ignored)


async def test_only_the_tenant_of_the_credentials_is_accepted(fake: TeamsStandIn, teams: Adapter) -> None:
    for tenant, kind in (("t1", Inbound), ("t2", Ignored)):
        teams.credentials = msgspec.structs.replace(teams.credentials, tenant_id=tenant)
        [item] = (await receive(teams, fake.signed(fake.activity()))).items
        assert isinstance(item, kind)


async def test_a_conversation_that_names_no_tenant_is_of_the_tenant_of_its_channel_data(
    fake: TeamsStandIn, teams: Adapter
) -> None:
    teams.credentials = msgspec.structs.replace(teams.credentials, tenant_id="t1")
    personal = {"conversationType": "personal", "id": "a:17I0kl9EkpE1"}
    for conversation, tenant, kind in (
        (personal, "t1", Inbound),
        (personal, "t2", Ignored),
        (personal | {"tenantId": "t2"}, "t1", Ignored),
    ):
        given = fake.activity(conversation=conversation, channelData={"tenant": {"id": tenant}})
        [item] = (await receive(teams, fake.signed(given))).items
        assert isinstance(item, kind)


async def test_files_are_named_and_other_shapes_are_told_apart(fake: TeamsStandIn, teams: Adapter) -> None:
    files = [{"contentType": "text/html", "content": "x"}, {"contentType": "image/png", "name": "a.png"}]
    [item] = (await receive(teams, fake.signed(fake.activity("", attachments=files)))).items
    assert isinstance(item, Inbound)
    assert item.text == "x\n\n[A file that cannot be read here: a.png]"
    with pytest.raises(UnreadableCall):
        await receive(teams, fake.signed({"type": 7}))
    with pytest.raises(UnreadableCall):
        await receive(teams, fake.signed(fake.activity(conversation=None)))
    with pytest.raises(InvalidMessage):
        await receive(teams, fake.signed(b"{"))


async def test_a_reply_quotes_its_message_at_the_service_of_the_call(fake: TeamsStandIn, teams: Adapter) -> None:
    answers = f"a1 {SERVICE}"
    await teams.send("**Done**", CONVERSATION, answers=answers, reply_to=answers)
    fake.tokens.clear()
    sent = await teams.send("more", CONVERSATION, answers=answers)
    assert [(message.to, message.text, message.fields["replyToId"]) for message in fake.ledger] == [
        (CONVERSATION, "**Done**", "a1"),
        (CONVERSATION, "more", None),
    ]
    assert (sent, len(fake.tokens)) == (fake.ledger[1].id, 1)


async def test_a_conversation_without_the_bot_fails_and_a_wrong_password_breaks_the_account(
    fake: TeamsStandIn, teams: Adapter
) -> None:
    fake.gone.add(CONVERSATION)
    with pytest.raises(EffectFailed, match="BotNotInConversationRoster"):
        await teams.send("x", CONVERSATION, answers=f"a1 {SERVICE}")
    fake.password = "rotated"
    fake.tokens.clear()
    with pytest.raises(AccountRefused):
        await teams.send("x", CONVERSATION, answers=f"a1 {SERVICE}")


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (answer(404, {"error": {"code": "ConversationNotFound", "message": "m"}}), EffectFailed),
        (answer(412, {"error": {"code": "PreconditionFailed", "message": "m"}}), Transient),
        (answer(429, retry_after="3"), RetryLater),
        (answer(502), Transient),
        (answer(201, "?"), Unanswered),
        (cut(accept=True), Unanswered),
    ],
)
async def test_permanent_transient_and_unknown_errors_are_distinguished(
    fake: TeamsStandIn, teams: Adapter, fault: Fault, error: type[Exception]
) -> None:
    await teams.send("first", CONVERSATION, answers=f"a1 {SERVICE}")
    fake.faults.append(fault)
    with pytest.raises(error) as raised:
        await teams.send("x", CONVERSATION, answers=f"a1 {SERVICE}")
    assert type(raised.value) is error


def test_a_long_text_is_split_by_bytes(teams: Adapter) -> None:
    parts = teams.vendor.split("界" * 20_000)
    assert all(len(part.encode()) <= 28_000 for part in parts)
    assert "".join(parts) == "界" * 20_000


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {
                "text": "<at>Bot</at>&nbsp;ask <at>Bo van Dam</at> now",
                "entities": [{"type": "mention", "text": "<at>Bo van Dam</at>", "mentioned": {"id": "29:2"}}],
            },
            "ask Bo van Dam now",
        ),
        ({"text": None, "attachments": [html("<p>a &lt; b</p><tr><td>1</td><td>2</td></tr>")]}, "a < b\n1 | 2 |"),
        (
            {"text": "see here", "attachments": [html('<p>see <a href="https://e.x/?a=1&amp;b=2">here</a></p>')]},
            "see here\n\n[Links: https://e.x/?a=1&b=2]",
        ),
        (
            {"text": "see", "attachments": [{"contentType": "reference", "name": "a.docx"}]},
            "see\n\n[A file that cannot be read here: a.docx]",
        ),
        (
            {
                "text": "see",
                "attachments": [
                    {
                        "contentType": "forwardedMessageReference",
                        "content": {"originalMessageContent": "<p>one<br>two</p><p>three</p>"},
                    }
                ],
            },
            "see\n\n[Forwarded message]\none\ntwo\nthree",
        ),
    ],
)
async def test_names_links_and_html_are_read(
    fake: TeamsStandIn, teams: Adapter, fields: dict[str, Any], text: str
) -> None:
    [item] = (await receive(teams, fake.signed(fake.activity(**fields)))).items
    assert isinstance(item, Inbound)
    assert item.text == text
