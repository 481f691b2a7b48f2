"""A person's content is sealed under a key of that person; destroying the key erases it everywhere at once.

Keys are not cached beyond the call that reads them: a process that still held a key would go on reading what another
one has erased. A read by primary key costs less than that promise.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from infra.postgres.tx import Tx
from infra.security.crypto import KEY_BYTES, Cipher, DataKey
from protos.catalog import PLATFORM_EVENTS
from protos.messages.user import SubjectErased
from protos.topology import Subscription

# What readers show in the place of what cannot be read any more.
ERASED_TEXT = "[erased]"

_PURPOSE = "subject key"

# Tenant id and subject id.
Subject = tuple[str, str]


class Erased(Exception):
    """The subject's key was destroyed: nothing of it can be read, and nothing more may be stored.

    A reader shows `ERASED_TEXT` instead; a handler leaves out what a late message would store.
    """


class SubjectKeys:
    """The keys of this service's subjects, each stored wrapped by the platform's cipher."""

    def __init__(self, cipher: Cipher) -> None:
        self._cipher = cipher

    async def key(self, tx: Tx, tenant_id: str, subject_id: str) -> DataKey:
        """The subject's key, made where there is none yet. Raises Erased where it was destroyed."""
        subject = tenant_id, subject_id
        key = (await self.keys(tx, [subject]))[subject]
        if key is None:
            raise Erased(f"subject {subject_id} was erased")
        return key

    async def keys(self, tx: Tx, subjects: Iterable[Subject]) -> dict[Subject, DataKey | None]:
        """The keys of all `subjects`, as `key` gives them; None for one that was destroyed."""
        # Sorted: two transactions that make the same ones wait for each other in one order, never in a circle.
        wanted = sorted(set(subjects))
        stored = await self._stored(tx, wanted)
        if missing := [subject for subject in wanted if subject not in stored]:
            # Waits for another transaction that is making one of them, and then leaves that one's.
            await tx.sql(
                "INSERT INTO subject_key (tenant_id, subject_id, wrapped) "
                "SELECT * FROM unnest($1::text[], $2::text[], $3::bytea[]) ON CONFLICT DO NOTHING",
                [tenant_id for tenant_id, _ in missing],
                [subject_id for _, subject_id in missing],
                [self._cipher.seal(os.urandom(KEY_BYTES), _PURPOSE, *subject) for subject in missing],
            )
            stored |= await self._stored(tx, missing)
        return {
            subject: None if wrapped is None else DataKey(self._cipher.open(wrapped, _PURPOSE, *subject))
            for subject, wrapped in stored.items()
        }

    async def _stored(self, tx: Tx, subjects: Sequence[Subject]) -> dict[Subject, bytes | None]:
        rows = await tx.sql(
            "SELECT tenant_id, subject_id, wrapped FROM subject_key "
            "JOIN unnest($1::text[], $2::text[]) AS n(tenant_id, subject_id) USING (tenant_id, subject_id)",
            [tenant_id for tenant_id, _ in subjects],
            [subject_id for _, subject_id in subjects],
        )
        return {(tenant_id, subject_id): wrapped for tenant_id, subject_id, wrapped in rows}


async def destroy(tx: Tx, tenant_id: str, subject_id: str) -> None:
    """Destroys the subject's key for good, also one that was not made yet; again: nothing more happens."""
    await tx.sql(
        "INSERT INTO subject_key AS k (tenant_id, subject_id, destroyed_at) VALUES ($1, $2, now()) "
        "ON CONFLICT (tenant_id, subject_id) DO UPDATE SET wrapped = NULL, "
        "destroyed_at = coalesce(k.destroyed_at, excluded.destroyed_at)",
        tenant_id,
        subject_id,
    )


def erasure(service: str) -> Subscription:
    """Destroys the keys of erased subjects; every service that keeps personal content consumes it."""

    @PLATFORM_EVENTS.each(SubjectErased, group=service)
    async def erase_subject(event: SubjectErased, tx: Tx) -> None:
        await destroy(tx, event.tenant_id, event.subject_id)

    return erase_subject
