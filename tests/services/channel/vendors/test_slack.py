"""The Slack adapter. Slack's own SDK judges the signatures."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from slack_sdk.signature import SignatureVerifier

from infra.clock import utcnow
from infra.errors import EffectFailed, InvalidMessage, RetryLater, Transient, Unanswered, Unauthenticated
from infra.outgoing.client import Outgoing
from services.channel.events import Attachment
from services.channel.vendors.base import AccountRefused, Outbound, Request, UnreadableCall
from services.channel.vendors.items import Deleted, Edited, Ignored, Inbound, Item, Reacted, Received
from services.channel.vendors.markdown import render
from services.channel.vendors.slack import MRKDWN, Slack, SlackCredentials, sign
from tooling.testing.vendors import Fault, SlackStandIn, answer, cut

# The example of https://docs.slack.dev/authentication/verifying-requests-from-slack
EXAMPLE = SlackCredentials("8f742231b10e8888abcd99yyyzzz85a5", "xoxb")
EXAMPLE_BODY = (
    b"token=xyzz0WbapA4vBCDEFasx0q6G&team_id=T1DC2JH3J&team_domain=testteamnow&channel_id=G8PSS9T3V"
    b"&channel_name=foobar&user_id=U2CERLKJA&user_name=roadrunner&command=%2Fwebhook-collect&text="
    b"&response_url=https%3A%2F%2Fhooks.slack.com%2Fcommands%2FT1DC2JH3J%2F397700885554%2F96rGlfmibIGlgcZRskXaIFfN"
    b"&trigger_id=398738663015.47445629121.803a0bc887a14d10d2c447fce8b6703c"
)
EXAMPLE_SIGNATURE = "v0=a2114d57b48eac39b9ad189dd8316235a7b4a8d21a10bd27519666489c69b503"


@pytest.fixture
async def vendor() -> AsyncIterator[SlackStandIn]:
    async with SlackStandIn() as running:
        yield running


def receive(vendor: SlackStandIn, call: tuple[bytes, dict[str, str]], **headers: str) -> Received:
    body, signed = call
    request = Request("POST", "", signed | {name.replace("_", "-"): value for name, value in headers.items()}, body)
    return Slack().receive(request, SlackCredentials(**vendor.credentials), utcnow())


def one(received: Received) -> Item:
    [item] = received.items
    return item


def test_the_vendors_own_example_verifies_and_a_command_is_read() -> None:
    headers = {
        "x-slack-request-timestamp": "1531420618",
        "x-slack-signature": EXAMPLE_SIGNATURE,
        "content-type": "application/x-www-form-urlencoded",
    }
    now = datetime.fromtimestamp(1531420618, UTC)
    item = one(Slack().receive(Request("POST", "", headers, EXAMPLE_BODY), EXAMPLE, now))
    assert isinstance(item, Inbound)
    assert (item.conversation, item.person, item.text) == ("G8PSS9T3V", "U2CERLKJA", "/webhook-collect")
    for late in (301, -301):
        with pytest.raises(Unauthenticated):
            Slack().receive(Request("POST", "", headers, EXAMPLE_BODY), EXAMPLE, now + timedelta(seconds=late))


def test_slacks_own_verifier_agrees_with_our_signature() -> None:
    timestamp = str(int(utcnow().timestamp()))
    body = '{"text":"größer 😀"}'
    verifier = SignatureVerifier(EXAMPLE.signing_secret)
    assert verifier.is_valid(body, timestamp, sign(EXAMPLE, timestamp, body.encode()))


@pytest.mark.parametrize(
    "headers",
    [
        {"x_slack_signature": ""},
        {"x_slack_signature": EXAMPLE_SIGNATURE},
        {"x_slack_signature": "v0=\xfc"},
        {"x_slack_request_timestamp": ""},
        {"x_slack_request_timestamp": "1e9"},
        {"x_slack_request_timestamp": "²"},
        {"x_slack_request_timestamp": "9" * 5000},
    ],
)
async def test_a_forged_call_is_refused(vendor: SlackStandIn, headers: dict[str, str]) -> None:
    with pytest.raises(Unauthenticated):
        receive(vendor, vendor.event("hi"), **headers)


async def test_a_changed_or_old_call_is_refused(vendor: SlackStandIn) -> None:
    body, headers = vendor.event("hi")
    with pytest.raises(Unauthenticated):
        receive(vendor, (body.replace(b"hi", b"ho"), headers))
    with pytest.raises(Unauthenticated):
        receive(vendor, vendor.signed({"type": "event_callback"}, age=301))


async def test_a_message_is_read_with_its_thread_and_as_it_was_written(vendor: SlackStandIn) -> None:
    item = one(receive(vendor, vendor.event("1 &lt; 2 &amp;&amp; &amp;lt;", thread_ts="1699999999.000001")))
    assert item == Inbound(
        ("event/Ev1", "message/C1/1700000000.000001"),
        "C1/1699999999.000001",
        "U1",
        "1700000000.000001",
        "1 < 2 && &lt;",
        "C1",
        in_group=True,
        root="1699999999.000001",
    )


async def test_mention_and_message_of_one_text_share_a_name(vendor: SlackStandIn) -> None:
    message = one(receive(vendor, vendor.event("hi", ts="1700000000.000009")))
    mention = one(receive(vendor, vendor.event("hi", kind="app_mention", ts="1700000000.000009")))
    assert len(set(message.ids) & set(mention.ids)) == 1
    # Of two events with one name, the first counts: both tell that the bot is mentioned.
    for text, named in (("<@U0BOT> hi", True), ("hi <@U0BOT|bot>", True), ("<@U0BOTTLE> hi", False)):
        item = one(receive(vendor, vendor.event(text)))
        assert isinstance(item, Inbound)
        assert item.mentions_bot is named


async def test_the_handshake_is_answered_only_if_it_is_signed(vendor: SlackStandIn) -> None:
    call = vendor.signed({"type": "url_verification", "token": "t", "challenge": "abc"})
    assert receive(vendor, call).ack.body == b"abc"
    with pytest.raises(Unauthenticated):
        receive(vendor, call, x_slack_signature=EXAMPLE_SIGNATURE)


@pytest.mark.parametrize(
    "event",
    [
        {"bot_id": "B1"},
        {"subtype": "bot_message"},
        {"user": "U0BOT"},
        {"user": "USLACKBOT"},
        # Slack adds the preview of a link.
        {"subtype": "message_changed", "message": {"user": "U1", "text": "new", "ts": "1700000000.000001"}},
        {
            "subtype": "message_changed",
            "message": {"bot_id": "B1", "text": "", "ts": "1700000000.000001", "edited": {"ts": "1700000001.000000"}},
        },
        {"subtype": "message_deleted", "deleted_ts": "1700000000.000001", "previous_message": {"bot_id": "B1"}},
        {"subtype": "channel_join"},
        {"user": None},
        {"user": None, "subtype": "file_share"},
        {"kind": "reaction_added", "reaction": "x", "item": {"type": "file", "file": "F1"}},
        {"kind": "star_added", "channel": {"id": "C1"}},
    ],
)
async def test_bots_changes_and_other_events_are_ignored(vendor: SlackStandIn, event: dict[str, Any]) -> None:
    assert isinstance(one(receive(vendor, vendor.event("hi", **event))), Ignored)


async def test_edits_deletions_and_reactions_name_their_message(vendor: SlackStandIn) -> None:
    taken = one(receive(vendor, vendor.event("hi", thread_ts="1700000000.000001")))
    assert isinstance(taken, Inbound)
    target = taken.ids[1]
    now = {"user": "U1", "text": "new &amp; better", "ts": taken.message, "thread_ts": "1700000000.000001"}
    was = {"user": "U1", "text": "hi"}
    edit: dict[str, Any] = {"subtype": "message_changed", "hidden": True, "previous_message": was}
    call = vendor.event("", **edit, message=now | {"edited": {"user": "U1", "ts": "1700000005.000000"}})
    edited = one(receive(vendor, call))
    assert isinstance(edited, Edited)
    assert (edited.target, edited.order) == (target, 1700000005000000)
    assert (edited.message.text, edited.message.conversation) == ("new & better", taken.conversation)
    deletions: list[dict[str, Any]] = [
        {"subtype": "message_deleted", "deleted_ts": taken.message, "previous_message": was},
        {"subtype": "message_changed", "message": {"subtype": "tombstone", "user": "USLACKBOT", "ts": taken.message}},
    ]
    for deletion in deletions:
        call = vendor.event("", **deletion)
        deleted = one(receive(vendor, call))
        assert isinstance(deleted, Deleted)
        assert deleted.target == target
    for kind, mode in (("reaction_added", "added"), ("reaction_removed", "removed")):
        item = {"type": "message", "channel": "C1", "ts": taken.message}
        call = vendor.event("", kind=kind, user="U2", reaction="thumbsup", item=item, event_ts="1700000007.000200")
        reacted = one(receive(vendor, call))
        assert isinstance(reacted, Reacted)
        assert reacted[1:] == (target, taken.message, "U2", (":thumbsup:",), mode, 1700000007000200, "")


async def test_a_notice_of_slacks_limit_is_ignored(vendor: SlackStandIn) -> None:
    notice = {"token": "t", "type": "app_rate_limited", "team_id": "T1", "minute_rate_limited": 1, "api_app_id": "A1"}
    assert isinstance(one(receive(vendor, vendor.signed(notice))), Ignored)


async def test_a_signed_event_of_another_shape_is_unreadable(vendor: SlackStandIn) -> None:
    for payload in (
        {"no": "type"},
        {"type": "event_callback", "event": {"type": "message", "user": "U1"}},
        {"type": "event_callback", "event": {"type": "message", "subtype": "message_deleted"}},
        {
            "type": "event_callback",
            "event": {
                "type": "reaction_added",
                "user": "U1",
                "reaction": "x",
                "item": {"type": "message", "channel": "C1", "ts": "1.1"},
                "event_ts": "soon",
            },
        },
        {"type": "event_callback", "event": {"type": "message", "user": "U1", "channel": 7, "ts": "1.1"}},
        "text",
    ):
        with pytest.raises(UnreadableCall):
            receive(vendor, vendor.signed(payload))


async def test_a_signed_call_that_is_not_json_is_invalid(vendor: SlackStandIn) -> None:
    for body in (b"", b"{", b"\xff"):
        with pytest.raises(InvalidMessage):
            receive(vendor, vendor.signed_bytes(body))


async def test_null_fields_do_not_make_a_message_unreadable(vendor: SlackStandIn) -> None:
    call = vendor.event("hi", thread_ts=None, files=None, attachments=None, blocks=None, subtype=None, bot_id=None)
    payload = msgspec.json.decode(call[0])
    item = one(receive(vendor, vendor.signed(payload | {"authorizations": None})))
    assert isinstance(item, Inbound)
    assert item.text == "hi"


@pytest.mark.parametrize(
    ("sent", "typed"),
    [
        ("see <https://e.example/a?x=1&amp;y=2>", "see https://e.example/a?x=1&y=2"),
        ("see <http://e.example|e.example> and <mailto:a@e.example|a@e.example>", "see e.example and a@e.example"),
        ("see <https://e.example/a|the page>", "see the page (https://e.example/a)"),
        ("<@U2> &lt;https://e.example&gt; <!here>", "<@U2> <https://e.example> @here"),
        ("<!channel|@channel> <!subteam^S1|@team> <!subteam^S2>", "@channel @team <!subteam^S2>"),
        ("in <#C2|general> or <#C3|>, call <tel:+491|+49 1>", "in #general or <#C3>, call +49 1 (tel:+491)"),
        ("due <!date^1392734382^{date_num} {time}^https://e.example|at 7 &lt; 8>", "due at 7 < 8"),
    ],
)
async def test_links_are_read_as_they_were_typed(vendor: SlackStandIn, sent: str, typed: str) -> None:
    item = one(receive(vendor, vendor.event(sent)))
    assert isinstance(item, Inbound)
    assert item.text == typed


async def test_a_forwarded_message_comes_with_the_words_about_it(vendor: SlackStandIn) -> None:
    file = {"id": "F1", "url_private": "https://files.slack.com/a.png", "mimetype": "image/png", "name": "a.png"}
    shared = [{"text": "Rain &amp; wind", "is_share": True, "files": [file]}, {"text": "a preview"}]
    item = one(receive(vendor, vendor.event("summarise this", attachments=shared)))
    assert isinstance(item, Inbound)
    assert item.text == "summarise this\n\n[Forwarded message]\nRain & wind"
    assert item.attachments == (Attachment("image", "https://files.slack.com/a.png", "a.png"),)


TABLE: dict[str, Any] = {"type": "table", "rows": [[{"type": "raw_text", "text": text} for text in "ab"]]}
SECTION: dict[str, Any] = {"type": "section", "text": {"type": "mrkdwn", "text": "in a block"}}


@pytest.mark.parametrize(
    ("text", "fields", "read"),
    [
        # A forwarded yes approves nothing.
        ("", {"attachments": [{"is_share": True, "text": "yes"}]}, "[Forwarded message]\nyes"),
        ("see", {"attachments": [{"is_msg_unfurl": True, "text": "x"}]}, "see\n\n[Forwarded message]\nx"),
        ("see", {"blocks": [SECTION, TABLE]}, "see\na | b"),
        ("see", {"attachments": [{"blocks": [TABLE], "fallback": "[no preview available]"}]}, "see\na | b"),
        ("", {"attachments": [{"blocks": [SECTION], "fallback": "[no preview available]"}]}, "in a block"),
        (
            "",
            {"attachments": [{"pretext": "Alert", "title": "Disk", "fields": [{"title": "Host", "value": "n3"}]}]},
            "Alert\nDisk\nHost: n3",
        ),
        ("see", {"files": [{"id": "F1", "name": "a.pdf"}]}, "see\n\n[A file that cannot be read here: a.pdf]"),
    ],
)
async def test_words_beside_a_text_are_read(vendor: SlackStandIn, text: str, fields: dict[str, Any], read: str) -> None:
    item = one(receive(vendor, vendor.event(text, **fields)))
    assert isinstance(item, Inbound)
    assert item.text == read


async def test_a_file_of_a_shared_channel_is_found_by_its_id(vendor: SlackStandIn, outgoing: Outgoing) -> None:
    item = one(receive(vendor, vendor.event("see", files=[{"id": "F1", "file_access": "check_file_info"}])))
    assert isinstance(item, Inbound)
    vendor.files["/files-pri/F1"] = b"content"
    [file] = item.attachments
    credentials = SlackCredentials(**vendor.credentials)
    assert await Slack().fetch(outgoing, vendor.url, credentials, file.ref, 100) == b"content"


async def test_a_message_of_a_shared_channel_has_one_name_in_all_workspaces(vendor: SlackStandIn) -> None:
    payload = msgspec.json.decode(vendor.event("hi")[0])
    other = payload | {"team_id": "T2", "event_id": "Ev9"}
    ours, theirs = one(receive(vendor, vendor.signed(payload))), one(receive(vendor, vendor.signed(other)))
    assert len(set(ours.ids) & set(theirs.ids)) == 1


async def test_an_edit_of_the_message_that_began_a_thread_stays_in_the_channel(vendor: SlackStandIn) -> None:
    root: dict[str, Any] = {"type": "message", "user": "U1", "text": "new", "ts": "1.000001", "thread_ts": "1.000001"}
    root |= {"edited": {"user": "U1", "ts": "2.000001"}}
    item = one(receive(vendor, vendor.event("", subtype="message_changed", message=root)))
    assert isinstance(item, Edited)
    assert (item.message.conversation, item.message.parent) == ("C1", None)


async def test_an_event_about_a_person_is_ignored_by_its_name(vendor: SlackStandIn) -> None:
    item = one(receive(vendor, vendor.signed(msgspec.json.decode(vendor.event("")[0]) | {"event": USER_CHANGE})))
    assert isinstance(item, Ignored)
    assert item.reason == "an event user_change"


USER_CHANGE = {"type": "user_change", "user": {"id": "U1", "name": "ada"}}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"files": [{"id": "F1", "name": "plan.pdf"}, {"title": None}]}, "plan.pdf"),
        ({"attachments": [{"text": "forwarded &amp; old"}, {"fallback": "preview"}]}, "forwarded & old\npreview"),
        (
            {"blocks": [{"type": "section", "text": {"type": "mrkdwn", "text": "in a block"}}]},
            "in a block",
        ),
        (
            {
                "blocks": [
                    {
                        "type": "rich_text",
                        "elements": [
                            {"type": "rich_text_section", "elements": [{"type": "text", "text": "rich "}]},
                            {"type": "rich_text_section", "elements": [{"type": "text", "text": "text"}]},
                        ],
                    }
                ]
            },
            "rich \ntext",
        ),
        (
            {
                "blocks": [
                    {
                        "type": "section",
                        "fields": [{"type": "mrkdwn", "text": "Due"}, {"type": "mrkdwn", "text": "May"}],
                    },
                    {"type": "table", "rows": [[{"type": "raw_text", "text": text} for text in "ab"]]},
                    {
                        "type": "rich_text_section",
                        "elements": [
                            {"type": "user", "user_id": "U2"},
                            {"type": "emoji", "name": "wave"},
                            {"type": "link", "url": "https://e.example"},
                            {"type": "link", "url": "https://e.example/x", "text": " the page"},
                            {"type": "broadcast", "range": "here"},
                            {"type": "channel", "channel_id": "C2"},
                            {"type": "usergroup", "usergroup_id": "S1"},
                            {"type": "date", "timestamp": 1, "format": "{date}", "fallback": "May 1"},
                        ],
                    },
                    {"type": "rich_text_preformatted", "elements": [{"type": "text", "text": "code"}]},
                    {"type": "rich_text_quote", "elements": [{"type": "text", "text": "said"}]},
                ]
            },
            "Due\nMay\na | b\n<@U2>:wave:https://e.example the page (https://e.example/x)"
            "@here<#C2><!subteam^S1>May 1\ncode\nsaid",
        ),
        ({"blocks": [{"type": "image", "image_url": "https://e.example"}]}, "of a form that is not known"),
    ],
)
async def test_a_text_outside_of_the_field_text_is_found(
    vendor: SlackStandIn, fields: dict[str, Any], text: str
) -> None:
    item = one(receive(vendor, vendor.event("", **fields)))
    assert isinstance(item, Inbound)
    assert text in item.text


async def test_markdown_becomes_slacks_markup(vendor: SlackStandIn, outgoing: Outgoing) -> None:
    text = (
        "# Plan\n\n**Done**: see [the page](https://e.example/a?x=1&y=2), *now* ~~not~~ `a<b`.\n\n"
        "<!channel> <@U1> a < b && c\n\n- one\n- two\n\n> quoted\n\n```py\nx = '<!here>'\n```\n\n"
        "| a | b |\n|---|---|\n| 1 | 2 |"
    )
    await send(vendor, outgoing, text)
    [message] = vendor.ledger
    assert message.fields["text"] == (
        "*Plan*\n\n*Done*: see <https://e.example/a?x=1&amp;y=2|the page>, _now_ ~not~ `a&lt;b`.\n\n"
        "&lt;!channel&gt; &lt;@U1&gt; a &lt; b &amp;&amp; c\n\n• one\n• two\n\n&gt; quoted\n\n"
        "```\nx = '&lt;!here&gt;'\n```\n\n```\na  b\n-  -\n1  2\n```"
    ).replace("&gt; quoted", "> quoted")


def test_a_cut_code_block_is_closed_and_opened_again() -> None:
    lines = [f"{' ' * (n % 9)}line_{n} = call({n}) if a < b else '{'x' * 40}'" for n in range(220)]
    parts = Slack().split("Look:\n\n```python\n" + "\n".join(lines) + "\n```\n\nDone.")
    assert len(parts) > 3
    for part in parts:
        shown = render(part, MRKDWN)
        assert len(shown) <= 4_000
        assert shown.count("```") % 2 == 0
    code = [line for part in parts for line in part.split("\n") if "line_" in line]
    assert code == lines
    assert parts[0].startswith("Look:")
    assert parts[-1].endswith("Done.")


async def send(vendor: SlackStandIn, outgoing: Outgoing, text: str = "hello", channel: str = "C1") -> str | None:
    credentials = SlackCredentials(**vendor.credentials)
    return await Slack().send(outgoing, vendor.url, credentials, Outbound("key", channel, text))


async def test_a_reply_goes_to_its_thread_and_cannot_notify_everybody(vendor: SlackStandIn, outgoing: Outgoing) -> None:
    sent = await send(vendor, outgoing, "<!channel> 1 & 2", "C1/1700000000.000100")
    [message] = vendor.ledger
    assert sent == message.id
    assert message.fields == {
        "channel": "C1",
        "text": "&lt;!channel&gt; 1 &amp; 2",
        "thread_ts": "1700000000.000100",
    }


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (answer(200, {"ok": False, "error": "channel_not_found"}), EffectFailed),
        (answer(200, {"ok": False, "error": "invalid_auth"}), AccountRefused),
        (answer(200, {"ok": False, "error": "token_revoked"}), AccountRefused),
        (answer(200, {"ok": False, "error": "ratelimited"}), RetryLater),
        (answer(200, {"ok": False, "error": "service_unavailable"}), Transient),
        (answer(503), Transient),
        (answer(200, "no JSON of Slack's"), Unanswered),
        (cut(accept=True), Unanswered),
    ],
)
async def test_permanent_transient_and_unknown_errors_are_distinguished(
    vendor: SlackStandIn, outgoing: Outgoing, fault: Fault, error: type[Exception]
) -> None:
    vendor.faults.append(fault)
    with pytest.raises(error) as raised:
        await send(vendor, outgoing)
    assert type(raised.value) is error


async def test_the_delay_that_slack_asks_for_is_kept(vendor: SlackStandIn, outgoing: Outgoing) -> None:
    vendor.faults.append(answer(429, {"ok": False, "error": "ratelimited"}, retry_after="30"))
    with pytest.raises(RetryLater) as raised:
        await send(vendor, outgoing)
    assert raised.value.after == timedelta(seconds=30)
