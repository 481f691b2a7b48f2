"""Subject keys: a person's content is sealed under that person's key, and destroying the key erases all of it at once.

A key is not cached beyond the call that reads it. A process with a cached key could still read content after another
process has erased it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from sqlalchemy.ext.asyncio import AsyncConnection

from infra.postgres import dead_letters
from infra.postgres.db import sql
from infra.postgres.tx import Tx
from infra.security.crypto import KEY_BYTES, Cipher, DataKey
from protos.catalog import PLATFORM_EVENTS
from protos.messages.user import SubjectErased
from protos.topology import Subscription

ERASED_TEXT = "[erased]"
"""Readers show this in place of erased content."""

_PURPOSE = "subject key"

Subject = tuple[str, str]
"""Tenant id and subject id."""


class Erased(Exception):
    """The subject's key was destroyed: its content cannot be read, and no new content of it may be stored.

    A reader shows `ERASED_TEXT` instead; the handler of a late message does not store its content.
    """


class SubjectKeys:
    """The keys of this service's subjects. Each is stored sealed by the platform's cipher."""

    def __init__(self, cipher: Cipher) -> None:
        self._cipher = cipher

    async def key(self, tx: Tx, tenant_id: str, subject_id: str) -> DataKey:
        """The subject's key, made if it does not exist. Raises Erased if it was destroyed."""
        subject = tenant_id, subject_id
        key = (await self.keys(tx, [subject]))[subject]
        if key is None:
            raise Erased(f"subject {subject_id} was erased")
        return key

    async def keys(self, tx: Tx, subjects: Iterable[Subject]) -> dict[Subject, DataKey | None]:
        """The keys of all `subjects`, made if they do not exist; None for a destroyed one, and for one of an erased
        tenant."""
        return await self.keys_of(await tx.connection(), subjects)

    async def keys_of(self, connection: AsyncConnection, subjects: Iterable[Subject]) -> dict[Subject, DataKey | None]:
        """As `keys`, for code of the kernel that has a connection and no transaction of a handler."""
        # Sorted, so that two transactions which make the same keys lock them in one order and cannot deadlock.
        wanted = sorted(set(subjects))
        stored = await _stored(connection, wanted)
        if missing := [subject for subject in wanted if subject not in stored]:
            await sql(
                connection,
                """
                -- Waits for another transaction that inserts one of these keys, and then keeps that transaction's key.
                INSERT INTO subject_key (tenant_id, subject_id, wrapped)
                SELECT n.*
                FROM unnest($1::text[], $2::text[], $3::bytea[]) AS n(tenant_id, subject_id, wrapped)
                WHERE NOT EXISTS (SELECT FROM erased_tenant AS e WHERE e.tenant_id = n.tenant_id)
                ON CONFLICT DO NOTHING
                """,
                [tenant_id for tenant_id, _ in missing],
                [subject_id for _, subject_id in missing],
                [self._cipher.seal(os.urandom(KEY_BYTES), _PURPOSE, *subject) for subject in missing],
            )
            stored |= await _stored(connection, missing)
        # A subject without a row is of an erased tenant.
        return {subject: self.opened(subject, stored.get(subject)) for subject in wanted}

    def opened(self, subject: Subject, wrapped: bytes | None) -> DataKey | None:
        """The key of a row of `subject_key` that the caller has read; None for a destroyed one."""
        return None if wrapped is None else DataKey(self._cipher.open(wrapped, _PURPOSE, *subject))


async def _stored(connection: AsyncConnection, subjects: Sequence[Subject]) -> dict[Subject, bytes | None]:
    rows = await sql(
        connection,
        """
        SELECT tenant_id, subject_id, wrapped
        FROM subject_key
        JOIN unnest((SELECT $1::text[]), $2::text[]) AS n(tenant_id, subject_id) USING (tenant_id, subject_id)
        """,
        [tenant_id for tenant_id, _ in subjects],
        [subject_id for _, subject_id in subjects],
    )
    return {(tenant_id, subject_id): wrapped for tenant_id, subject_id, wrapped in rows}


async def destroy(tx: Tx, tenant_id: str, subject_id: str) -> None:
    """Destroys the subject's key for good, and prevents that one is made later. A second call changes nothing."""
    await tx.sql(
        """
        INSERT INTO subject_key AS k (tenant_id, subject_id, destroyed_at)
        VALUES ($1, $2, now())
        ON CONFLICT (tenant_id, subject_id) DO UPDATE
        SET wrapped = NULL, destroyed_at = coalesce(k.destroyed_at, excluded.destroyed_at)
        """,
        tenant_id,
        subject_id,
    )


async def destroy_all(tx: Tx, tenant_id: str) -> None:
    """Destroys the keys of all subjects of an erased tenant for good, and the payloads of its dead letters."""
    await tx.sql("INSERT INTO erased_tenant (tenant_id) VALUES ($1) ON CONFLICT DO NOTHING", tenant_id)
    await tx.sql(
        """
        UPDATE subject_key
        SET wrapped = NULL, destroyed_at = coalesce(destroyed_at, now())
        WHERE tenant_id = $1
        """,
        tenant_id,
    )
    await dead_letters.erase(await tx.connection(), tenant_id)


def erasure(service: str) -> Subscription:
    """The subscription that destroys the keys of erased subjects, and the payloads of their dead letters.

    Every service that keeps personal content has it.
    """

    @PLATFORM_EVENTS.each(SubjectErased, group=service)
    async def erase_subject(event: SubjectErased, tx: Tx) -> None:
        await destroy(tx, event.tenant_id, event.subject_id)
        await dead_letters.erase(await tx.connection(), event.tenant_id, event.subject_id)

    return erase_subject
