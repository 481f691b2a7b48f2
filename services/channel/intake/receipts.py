"""Receipts of vendors for messages that they have accepted: delivered, read, or not delivered after all."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from infra.postgres.database import Database
from infra.postgres.tx import Tx, derived_id
from services.channel import projections
from services.channel.accounts.store import ChannelAccount, break_account
from services.channel.deliveries.queueing import DELIVERIES, EXPIRES, DueDelivery
from services.channel.domain import MarkReceived, part_id
from services.channel.events import DeliveryResumed
from services.channel.publishing import DELIVERY
from services.channel.vendors.base import AccountRefused
from services.channel.vendors.items import Receipt


async def record(database: Database, account: ChannelAccount, receipts: Sequence[Receipt]) -> None:
    """Records the receipts of one call. Those of foreign messages, and those that say nothing new, change nothing."""
    by_message: dict[str, list[Receipt]] = {}
    for receipt in receipts:
        by_message.setdefault(receipt.message, []).append(receipt)
    # No message has NUL in its id, and the database refuses it.
    messages = [message for message in by_message if "\0" not in message]

    async def work(tx: Tx) -> None:
        rows = await tx.sql(
            """
            SELECT id, session_key, vendor_message_id, part_ids FROM delivery
            WHERE ((channel_id = $1 AND vendor_message_id = ANY($2::text[])) OR part_ids && $3::text[])
                AND state IN ('queued', 'sent', 'delivered')
            ORDER BY id
            """,
            account.id,
            messages,
            [part_id(account.id, message) for message in messages],
        )
        for delivery_id, session_key, last, parts in rows:
            ids = dict.fromkeys((last, *(part.partition("/")[2] for part in parts or ())))
            for receipt in [receipt for message in ids for receipt in by_message.get(message, ())]:
                is_late = account.vendor.takes_late(account.credentials, receipt.reason)
                late = receipt.message if is_late else ""
                command = MarkReceived(receipt.state, receipt.reason, receipt.message == last, late)
                for event in await tx.decide(DELIVERY.stream(str(delivery_id)), command):
                    await projections.project(tx, delivery_id, event)
                    if isinstance(event, DeliveryResumed):
                        due = DueDelivery(UUID(str(delivery_id)))
                        item_id = derived_id(due.delivery_id, "late", event.part)
                        tx.enqueue(DELIVERIES, lane=session_key, item=due, item_id=item_id, expires_in=EXPIRES)
                    if receipt.reason.startswith(AccountRefused.PREFIX):
                        await break_account(tx, account, receipt.reason)

    await database.run(work, tenant_id=account.tenant_id)
