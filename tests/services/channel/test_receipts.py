"""Receipts, which vendors send after they have accepted a message, against the running service."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import msgspec
import pytest

from services.channel.deliveries.queueing import DueDelivery
from services.channel.handlers import expire_delivery
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


async def test_a_receipt_for_any_part_of_a_long_answer_finds_its_delivery(desk: Desk) -> None:
    async with WhatsAppStandIn() as meta:
        channel = await desk.connect("whatsapp", meta.credentials, meta.url)
        await desk.call(channel, meta.call(meta.message("question")))
        [inbound] = await desk.received(channel)
        sent = await desk.settled(await desk.reply(inbound, "word " * 2_000))
        first, _, last = meta.ledger
        for id_, status, state in ((first.id, "read", "sent"), (last.id, "delivered", "delivered")):
            await desk.call(channel, meta.call(statuses=[{"id": id_, "status": status}]))
            assert (await desk.delivery(sent["id"]))["state"] == state
        errors = [{"code": 131026, "title": "Undeliverable"}]
        await desk.call(channel, meta.call(statuses=[{"id": first.id, "status": "failed", "errors": errors}]))
        assert (await desk.delivery(sent["id"]))["state"] == "failed"


async def test_a_receipt_that_refuses_the_account_breaks_the_channel(desk: Desk) -> None:
    async with WhatsAppStandIn() as meta:
        channel = await desk.connect("whatsapp", meta.credentials, meta.url)
        await desk.call(channel, meta.call(meta.message("question")))
        [inbound] = await desk.received(channel)
        sent = await desk.settled(await desk.reply(inbound, "answer"))
        # A receipt of a foreign message changes nothing.
        for id_, state in (("wamid.foreign", "ok"), (sent["vendor_message_id"], "broken")):
            errors = [{"code": 131042, "title": "Payment issue"}]
            await desk.call(channel, meta.call(statuses=[{"id": id_, "status": "failed", "errors": errors}]))
            assert (await desk.channel(channel["id"]))["state"] == state
        assert (await desk.delivery(sent["id"]))["reason"] == "account refused: 131042: Payment issue"
        later = await desk.settled(await desk.reply(inbound, "answer"))
        assert later["reason"] == "the channel is broken: 131042: Payment issue"


async def test_a_day_after_the_persons_last_message_the_answer_goes_by_template(desk: Desk) -> None:
    async with WhatsAppStandIn() as meta:
        channel = await desk.connect("whatsapp", meta.credentials | {"template": "news"}, meta.url)
        await desk.call(channel, meta.call(meta.message("question", person="491")))
        [inbound] = await desk.received(channel)
        await desk.settled(await desk.reply(inbound, "in time"))
        async with desk.platform.database("channel").begin() as tx:
            await tx.sql(
                "UPDATE conversation SET last_at = last_at - interval '1 day 1 minute' WHERE session_key = $1",
                inbound["session_key"],
            )
        meta.closed.add("491")
        meta.refuses_later = True
        await desk.settled(await desk.reply(inbound, "late"))
        assert [(sent.text, sent.fields["type"]) for sent in meta.ledger] == [("in time", "text"), ("late", "template")]


async def test_a_text_that_whatsapp_accepts_and_refuses_as_too_late_goes_once_by_template(desk: Desk) -> None:
    async with WhatsAppStandIn() as meta:
        channel = await desk.connect("whatsapp", meta.credentials | {"template": "news"}, meta.url)
        await desk.call(channel, meta.call(meta.message("question", person="491")))
        [inbound] = await desk.received(channel)

        async def refuse(delivery: dict[str, Any], code: int) -> dict[str, Any]:
            errors = [{"code": code, "title": "Refused"}]
            status = {"id": delivery["vendor_message_id"], "status": "failed", "errors": errors}
            assert (await desk.call(channel, meta.call(statuses=[status]))).status_code == 200
            return await desk.settled(delivery["id"])

        meta.closed.add("491")
        meta.refuses_later = True
        first = await desk.settled(await desk.reply(inbound, "late"))
        by_template = await refuse(first, 131047)
        assert (by_template["state"], by_template["vendor_message_id"]) == ("sent", meta.ledger[0].id)
        # The vendor repeats its call.
        assert await refuse(first, 131047) == by_template
        assert (await refuse(by_template, 131047))["reason"] == "131047: Refused"
        other = await desk.settled(await desk.reply(inbound, "other"))
        assert (await refuse(other, 131026))["reason"] == "131026: Refused"
        assert [(sent.text, sent.fields["type"]) for sent in meta.ledger] == [("late", "template")]
        published = await desk.published(channel, "MessageDelivered")
        assert [one["delivery_id"] for one in published] == [first["id"], other["id"]]


async def test_each_part_that_is_too_late_goes_once_by_template(desk: Desk) -> None:
    async with WhatsAppStandIn() as meta:
        channel = await desk.connect("whatsapp", meta.credentials | {"template": "news"}, meta.url)
        await desk.call(channel, meta.call(meta.message("question", person="491")))
        [inbound] = await desk.received(channel)
        meta.closed.add("491")
        meta.refuses_later = True
        sent = await desk.settled(await desk.reply(inbound, f"first{' ' * 5_000}second"))
        async with desk.platform.database("channel").begin() as tx:
            [(parts,)] = await tx.sql("SELECT part_ids FROM delivery WHERE id = $1", UUID(sent["id"]))
        for part in parts:
            errors = [{"code": 131047, "title": "Refused"}]
            status = {"id": part.partition("/")[2], "status": "failed", "errors": errors}
            assert (await desk.call(channel, meta.call(statuses=[status]))).status_code == 200
            assert (await desk.settled(sent["id"]))["state"] == "sent"
        assert [one.text for one in meta.ledger] == ["first", "second"]
        await desk.call(channel, meta.call(statuses=[{"id": meta.ledger[1].id, "status": "delivered"}]))
        assert (await desk.delivery(sent["id"]))["state"] == "delivered"


@pytest.mark.parametrize(
    ("effects", "state"),
    [
        ({"-1/late": "succeeded", "-2/late": "succeeded"}, "sent"),
        ({"-1/late": "succeeded", "-2/late": "started"}, "unknown"),
        ({"-1/late": "succeeded"}, "failed"),
        ({"-1": "succeeded", "-2": "succeeded"}, "failed"),
    ],
)
async def test_a_delivery_that_expires_while_its_parts_go_by_template_tells_what_was_sent(
    desk: Desk, effects: dict[str, str], state: str
) -> None:
    async with WhatsAppStandIn() as meta:
        channel = await desk.connect("whatsapp", meta.credentials | {"template": "news"}, meta.url)
        await desk.call(channel, meta.call(meta.message("question", person="491")))
        [inbound] = await desk.received(channel)
        sent = await desk.settled(await desk.reply(inbound, f"first{' ' * 5_000}second"))
        id_ = UUID(sent["id"])
        async with desk.client() as http:
            await http.post(f"/api/v1/channels/{channel['id']}/pause")
        refused = {"status": "failed", "errors": [{"code": 131047, "title": "Refused"}]}
        await desk.call(channel, meta.call(statuses=[{"id": one.id, **refused} for one in meta.ledger]))
        async with desk.platform.database("channel").begin(tenant_id=desk.tenant_id) as tx:
            for key, end in effects.items():
                await tx.sql(
                    """
                    INSERT INTO lane_effect (tenant_id, key, kind, state, attempt, lane_id, epoch, result, started_at)
                    VALUES ($1, $2, 'once', $3, 1, 1, 1, $4, now())
                    ON CONFLICT (tenant_id, key) DO NOTHING
                    """,
                    desk.tenant_id,
                    f"{id_}{key}",
                    end,
                    msgspec.json.encode({"vendor_message_id": f"wamid{key}", "is_last": key.startswith("-2")})
                    if end == "succeeded"
                    else None,
                )
            await expire_delivery(DueDelivery(id_), tx)
        ended = await desk.delivery(sent["id"])
        assert ended["state"] == state
        if state == "sent":
            assert ended["vendor_message_id"] == "wamid-2/late"


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
