"""Files that are sent, by each vendor that takes them."""

from __future__ import annotations

import base64

import pytest

from infra.errors import EffectFailed, Transient, Unanswered
from infra.outgoing.client import Outgoing
from services.channel.vendors.base import AccountRefused, OutboundFile
from services.channel.vendors.slack import Slack
from tests.services.channel.vendors.conftest import Adapter
from tests.services.channel.vendors.test_accounts import FAKES
from tooling.testing.vendors import (
    DiscordStandIn,
    LineStandIn,
    SlackStandIn,
    TelegramStandIn,
    WebhookStandIn,
    WhatsAppStandIn,
    answer,
    cut,
)
from tooling.testing.vendors.server import Fault

PNG = b"\x89PNG\r\n\x1a\n\x00\xff\r\n--x\n"
IMAGE = OutboundFile("https://files.example/a.png", "a.png", "image/png", PNG)
PAPER = OutboundFile("https://files.example/b.pdf", "b.pdf", "application/pdf", b"%PDF-1.7 \xe4")
LINK = "a.png: https://files.example/a.png"
# The conversation, and how the vendor shows an image and a document.
SHOWN = {
    "telegram": ("-5/3", "[photo a.png]", "[document b.pdf]"),
    "slack": ("C1/1700000000.000100", "[file a.png]", "[file b.pdf]"),
    "discord": ("7", "[file a.png]", "[file b.pdf]"),
    "whatsapp": ("49151", "[image https://files.example/a.png]", "[document b.pdf]"),
    "webhook": ("c1", "", ""),
}


@pytest.mark.parametrize("name", sorted(SHOWN))
async def test_files_are_sent(name: str, outgoing: Outgoing) -> None:
    to, *shown = SHOWN[name]
    async with FAKES[name]() as fake:
        if isinstance(fake, TelegramStandIn):
            fake.topics.add(3)
        adapter = Adapter(name, fake, outgoing)
        for n, file in enumerate((IMAGE, PAPER)):
            await adapter.send(LINK, to, f"d{n}", file=file)
        assert [(one.to, one.text) for one in fake.ledger] == [(to, text) for text in shown]
        assert fake.refusals == []
        contents = [one.fields["content"] for one in fake.ledger if "content" in one.fields]
        assert contents == ([] if name in ("whatsapp", "webhook") else [IMAGE.content, PAPER.content])
        types = [one.fields["type"] for one in fake.ledger if name in ("telegram", "discord")]
        assert types in ([], ["image/png", "application/pdf"])


async def test_a_webhook_gets_the_addresses_with_the_types(outgoing: Outgoing) -> None:
    async with WebhookStandIn() as fake:
        adapter = Adapter("webhook", fake, outgoing)
        for _ in range(2):
            await adapter.send(LINK, "c1", file=IMAGE)
        [one] = fake.ledger
        assert one.fields["attachments"] == [{"url": IMAGE.url, "name": "a.png", "content_type": "image/png"}]
        assert fake.repeats == 1


async def test_a_file_of_our_store_is_uploaded_to_whatsapp_and_lies_in_the_message_to_a_webhook(
    outgoing: Outgoing,
) -> None:
    async with WhatsAppStandIn() as meta, WebhookStandIn() as hook:
        for n, file in enumerate((IMAGE, PAPER)):
            stored = file._replace(url="", path="p")
            await Adapter("whatsapp", meta, outgoing).send(LINK, "49151", file=stored)
            await Adapter("webhook", hook, outgoing).send(LINK, "c1", f"d{n}", file=stored)
        assert [one.fields["content"] for one in meta.ledger] == [IMAGE.content, PAPER.content]
        assert [one.fields["type"] for one in meta.ledger] == ["image", "document"]
        urls = [one.fields["attachments"][0]["url"] for one in hook.ledger]
        assert urls[0] == f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
        assert urls[1].startswith("data:application/pdf;base64,")


async def test_line_gets_the_address_of_an_image_and_only_by_https(outgoing: Outgoing) -> None:
    async with LineStandIn() as fake:
        adapter = Adapter("line", fake, outgoing)
        for _ in range(2):
            await adapter.send(LINK, "U1", "d1", file=IMAGE)
        await adapter.send(
            "http://files.example/a.png", "U1", "d2", file=IMAGE._replace(url="http://files.example/a.png")
        )
        assert fake.texts() == ["[image https://files.example/a.png]", "http://files.example/a.png"]
        assert fake.repeats == 1


async def test_telegram_sends_an_image_that_is_no_photo_as_a_document_and_follows_a_moved_group(
    outgoing: Outgoing,
) -> None:
    async with TelegramStandIn() as fake:
        fake.no_photos.add(PNG)
        fake.moved[-5] = -100
        assert await Adapter("telegram", fake, outgoing).send(LINK, "-5", file=IMAGE) == fake.ledger[0].id
        assert [(one.to, one.text) for one in fake.ledger] == [("-100", "[document a.png]")]
        fake.blocked.add(6)
        with pytest.raises(EffectFailed, match="blocked"):
            await Adapter("telegram", fake, outgoing).send(LINK, "6", file=PAPER)
        fake.revoked = True
        with pytest.raises(AccountRefused):
            await Adapter("telegram", fake, outgoing).send(LINK, "7", file=PAPER)


async def test_slack_shows_a_file_only_after_the_last_call(outgoing: Outgoing) -> None:
    async with SlackStandIn() as fake:
        adapter = Adapter("slack", fake, outgoing)
        handled = Fault(late=True)
        for before, error in ((0, Transient), (1, Transient), (2, Unanswered)):
            fake.faults.extend([*[handled] * before, cut(accept=True)])
            with pytest.raises(error):
                await adapter.send(LINK, "C1", file=PAPER)
            assert len(fake.ledger) == before // 2
        fake.faults.extend([handled, answer(403)])
        with pytest.raises(EffectFailed, match="HTTP 403"):
            await adapter.send(LINK, "C1", file=PAPER)
        fake.unknown.add("C2")
        with pytest.raises(EffectFailed, match="channel_not_found"):
            await adapter.send(LINK, "C2", file=PAPER)


@pytest.mark.parametrize("before", [0, 2])
async def test_slack_without_the_scope_for_files_refuses_the_file_and_not_the_account(
    outgoing: Outgoing, before: int
) -> None:
    async with SlackStandIn() as fake:
        fake.faults.extend([*[Fault(late=True)] * before, answer(200, {"ok": False, "error": "missing_scope"})])
        with pytest.raises(EffectFailed, match="missing_scope") as raised:
            await Adapter("slack", fake, outgoing).send(LINK, "C1", file=PAPER)
        assert type(raised.value) is EffectFailed


async def test_discord_takes_a_repeated_file_once(outgoing: Outgoing) -> None:
    async with DiscordStandIn() as fake:
        adapter = Adapter("discord", fake, outgoing)
        fake.faults.append(cut(accept=True))
        with pytest.raises(Unanswered):
            await adapter.send(LINK, "7", file=IMAGE)
        await adapter.send(LINK, "7", file=IMAGE)
        assert (fake.texts(), fake.repeats) == (["[file a.png]"], 1)


async def test_a_file_for_slack_is_uploaded_to_slack_only(outgoing: Outgoing) -> None:
    async with SlackStandIn() as fake:
        fake.upload_origin = "https://files.slack.com.evil.example"
        adapter = Adapter("slack", fake, outgoing)

        class Genuine(Slack):
            """The fake's origin counts as the vendor's own, so the address of the upload is taken as it is."""

            origin = fake.url

        adapter.vendor = Genuine()
        with pytest.raises(EffectFailed, match="not the vendor's"):
            await adapter.send(LINK, "C1", file=PAPER)
        assert fake.ledger == []
