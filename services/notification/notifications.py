"""The table of notifications. It holds the sealed content of an e-mail until the e-mail is sent."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import msgspec
from pydantic import BaseModel, ConfigDict

from infra.observe.logs import get_logger
from infra.postgres.tx import Tx
from infra.security.crypto import Cipher
from infra.security.rewrap import SealedColumn
from protos.messages.notification import Attachment
from services.notification.domain import SendResult, masked

KEEP = timedelta(days=90)
# E-mails of a tenant within a day, each to up to 20 owners: tenants choose the addresses, the causes and some of the
# words, and a provider blocks a platform that sends too much. The last ones are for e-mails with a file, such as
# invoices. The API shows the facts of the others, too. E-mails that are queued at the same moment may be a few more.
DAY = timedelta(days=1)
MAX_A_DAY = 50
FOR_FILES = 10
TOO_MANY = f"the tenant has had {MAX_A_DAY - FOR_FILES} e-mails within a day"
TOO_MANY_FILES = f"the tenant has had {MAX_A_DAY} e-mails within a day"
_PURPOSE = "notification"
SEALED = SealedColumn("notification", "content", _PURPOSE, ("tenant_id", "id::text"))

_log = get_logger("services.notification.notifications")


class Email(msgspec.Struct, frozen=True):
    to: str
    """An address. Empty means the tenant's owners."""
    subject: str
    text: str
    at: datetime
    attachment: Attachment | None = None


class Notification(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    id: UUID
    kind: Literal["email", "push"]
    state: Literal["queued", "sent", "failed"]
    reason: str
    """The error; empty if there was none."""
    to: list[str]
    """The masked addresses; empty until the e-mail is sent. While others wait, those that have it."""
    created_at: datetime
    finished_at: datetime | None

    def cursor(self) -> str:
        return f"{self.created_at.isoformat()} {self.id}"


class Notifications:
    """The rows of e-mails, by the id of the message that requested them."""

    def __init__(self, cipher: Cipher) -> None:
        self._cipher = cipher

    async def queue(self, tx: Tx, id_: UUID, email: Email) -> bool:
        """Stores an e-mail. False if the tenant has had too many: it is stored as failed, without its content."""
        tenant_id = tx.tenant_id or ""
        [(count,)] = await tx.sql(
            """
            SELECT count(*) FROM notification
            WHERE tenant_id = $1 AND kind = 'email' AND created_at > now() - $2::interval AND reason <> ALL($3::text[])
            """,
            tenant_id,
            DAY,
            [TOO_MANY, TOO_MANY_FILES],
        )
        if count >= (MAX_A_DAY if email.attachment else MAX_A_DAY - FOR_FILES):
            reason = TOO_MANY_FILES if email.attachment else TOO_MANY
            _log.warning("an e-mail is not sent", tenant_id=tenant_id, notification_id=str(id_), reason=reason)
            await store_failure(tx, id_, "email", reason)
            return False
        await tx.sql(
            "INSERT INTO notification (tenant_id, id, kind, state, content) VALUES ($1, $2, 'email', 'queued', $3)",
            tenant_id,
            id_,
            self._cipher.seal(msgspec.json.encode(email), _PURPOSE, tenant_id, str(id_)),
        )
        return True

    async def read(self, tx: Tx, id_: UUID) -> Email:
        """The content of a queued e-mail."""
        [(content,)] = await tx.sql(
            "SELECT content FROM notification WHERE tenant_id = $1 AND id = $2", tx.tenant_id, id_
        )
        return msgspec.json.decode(self._cipher.open(content, _PURPOSE, tx.tenant_id or "", str(id_)), type=Email)


async def store_failure(tx: Tx, id_: UUID, kind: Literal["email", "push"], reason: str) -> None:
    """Stores the failure of a notification that was not queued, without its content."""
    await tx.sql(
        """
        INSERT INTO notification (tenant_id, id, kind, state, reason, finished_at)
        VALUES ($1, $2, $3, 'failed', $4, clock_timestamp())
        """,
        tx.tenant_id,
        id_,
        kind,
        reason,
    )


async def store_reached(tx: Tx, id_: UUID, recipients: Sequence[str]) -> None:
    """Stores the recipients that have an e-mail which others do not have yet."""
    await tx.sql(
        "UPDATE notification SET recipients = $3 WHERE tenant_id = $1 AND id = $2",
        tx.tenant_id,
        id_,
        [masked(recipient) for recipient in recipients],
    )


async def reached(tx: Tx, id_: UUID) -> list[str]:
    """The masked addresses of those that have an e-mail."""
    [(recipients,)] = await tx.sql(
        "SELECT recipients FROM notification WHERE tenant_id = $1 AND id = $2", tx.tenant_id, id_
    )
    return list(recipients)


async def store_result(tx: Tx, id_: UUID, result: SendResult, recipients: Sequence[str] = ()) -> None:
    """Stores the result of an e-mail, and deletes its content."""
    await tx.sql(
        """
        UPDATE notification SET state = $3, reason = $4, recipients = $5, content = NULL,
        finished_at = clock_timestamp() WHERE tenant_id = $1 AND id = $2
        """,
        tx.tenant_id,
        id_,
        result.state,
        result.reason,
        [masked(recipient) for recipient in recipients],
    )


async def stored_notifications(
    tx: Tx, tenant_id: str, *, before: tuple[datetime, UUID] | None, limit: int
) -> list[Notification]:
    """The tenant's notifications, newest first, that are older than `before`."""
    rows = await tx.sql(
        """
        SELECT id, kind, state, reason, recipients, created_at, finished_at FROM notification WHERE tenant_id = $1
        AND ($2::timestamptz IS NULL OR (created_at, id) < ($2, $3::uuid)) ORDER BY created_at DESC, id DESC LIMIT $4
        """,
        tenant_id,
        *(before or (None, None)),
        limit,
    )
    names: tuple[Any, ...] = ("id", "kind", "state", "reason", "to", "created_at", "finished_at")
    return [Notification(**dict(zip(names, row, strict=True))) for row in rows]


async def forget(tx: Tx, limit: int) -> int:
    """Deletes up to `limit` old notifications. Returns their number."""
    rows = await tx.sql(
        """
        DELETE FROM notification WHERE (tenant_id, id) IN (
            SELECT tenant_id, id FROM notification
            WHERE created_at < clock_timestamp() - $1::interval
            ORDER BY tenant_id, id
            LIMIT $2
            FOR UPDATE SKIP LOCKED
        )
        RETURNING id
        """,
        KEEP,
        limit,
    )
    return len(rows)
