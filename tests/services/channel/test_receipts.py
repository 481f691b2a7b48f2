"""Receipts, which vendors send after they have accepted a message, against the running service."""

from __future__ import annotations

from typing import Any

from tests.services.channel.conftest import Desk
from tooling.testing.vendors import TwilioStandIn, WhatsAppStandIn


async def test_receipts_change_a_sent_delivery_once(desk: Desk) -> None:
    async with WhatsAppStandIn() as meta:
        channel = await desk.connect("whatsapp", meta.credentials, meta.url)
        await desk.call(channel, meta.call(meta.message("question")))
        [inbound] = await desk.received(channel)
        read, lost = [await desk.settled(await desk.reply(inbound, text)) for text in ("one", "two")]

        async def tell(delivery: dict[str, Any], status: str, **fields: Any) -> None:
            statuses = [{"id": id_, "status": status, **fields} for id_ in (delivery["vendor_message_id"], "other\0")]
            assert (await desk.call(channel, meta.call(statuses=statuses))).status_code == 200

        for status in ("sent", "delivered", "read", "delivered", "failed"):
            await tell(read, status)
        await tell(lost, "failed", errors=[{"code": 131026, "title": "Undeliverable"}])
        changed = await desk.delivery(read["id"])
        assert (changed["state"], changed["vendor_message_id"]) == ("read", read["vendor_message_id"])
        changed = await desk.delivery(lost["id"])
        assert (changed["state"], changed["reason"]) == ("failed", "131026: Undeliverable")
        [published] = await desk.published(channel, "MessageUndelivered")
        assert published["delivery_id"] == lost["id"]


async def test_a_message_names_the_address_for_its_receipts(desk: Desk) -> None:
    async with TwilioStandIn() as twilio:
        channel = await desk.connect("twilio", twilio.credentials, twilio.url)
        url = f"http://127.0.0.1:8080{channel['webhook_path']}"
        await desk.call(channel, twilio.message(url, "question"))
        [inbound] = await desk.received(channel)
        sent = await desk.settled(await desk.reply(inbound, "answer"))
        assert twilio.ledger[0].fields["StatusCallback"] == url
        for state in ("delivered", "sent", "delivered"):
            assert (await desk.call(channel, twilio.status(sent["vendor_message_id"], state))).status_code == 200
        assert (await desk.delivery(sent["id"]))["state"] == "delivered"
