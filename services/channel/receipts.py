"""Receipts of vendors for messages that they have accepted: delivered, read, or not delivered after all."""

from __future__ import annotations

from collections.abc import Sequence

from infra.postgres.database import Database
from infra.postgres.tx import Tx
from services.channel import projections
from services.channel.accounts import ChannelAccount, break_account
from services.channel.domain import MarkReceived, part_id
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
            SELECT id, vendor_message_id, part_ids FROM delivery
            WHERE ((channel_id = $1 AND vendor_message_id = ANY($2::text[])) OR part_ids && $3::text[])
                AND state IN ('sent', 'delivered')
            ORDER BY id
            """,
            account.id,
            messages,
            [part_id(account.id, message) for message in messages],
        )
        for delivery_id, last, parts in rows:
            ids = dict.fromkeys((last, *(part.partition("/")[2] for part in parts or ())))
            for receipt in [receipt for message in ids for receipt in by_message.get(message, ())]:
                command = MarkReceived(receipt.state, receipt.reason, receipt.message == last)
                for event in await tx.decide(DELIVERY.stream(str(delivery_id)), command):
                    await projections.project(tx, delivery_id, event)
                    if receipt.reason.startswith(AccountRefused.PREFIX):
                        await break_account(tx, account, receipt.reason)

    await database.run(work, tenant_id=account.tenant_id)
