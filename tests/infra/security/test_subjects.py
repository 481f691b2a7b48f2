"""A person's content is erased with that person's key."""

from __future__ import annotations

import asyncio
import base64
from uuid import uuid4

import pytest

from infra.errors import InvalidMessage
from infra.postgres.database import Database
from infra.security.crypto import Cipher
from infra.security.subjects import Erased, SubjectKeys, destroy_all, erasure
from protos.messages.user import SubjectErased

CIPHER = Cipher(base64.b64encode(bytes(range(32))).decode())


@pytest.fixture
def keys() -> SubjectKeys:
    return SubjectKeys(CIPHER)


async def erase(database: Database, tenant_id: str, subject_id: str) -> None:
    async with database.begin() as tx:
        await erasure("sample_desk").handler(SubjectErased(tenant_id=tenant_id, subject_id=subject_id), tx)


async def test_each_subject_has_one_key_of_its_own(desk: Database, keys: SubjectKeys) -> None:
    subject = uuid4().hex
    async with desk.begin() as tx:
        sealed = (await keys.key(tx, "t1", subject)).seal("hello", "event-1")
    async with desk.begin() as tx:
        assert (await SubjectKeys(CIPHER).key(tx, "t1", subject)).open(sealed, "event-1") == "hello"
        for tenant_id, subject_id in (("t2", subject), ("t1", uuid4().hex)):
            with pytest.raises(InvalidMessage):
                (await keys.key(tx, tenant_id, subject_id)).open(sealed, "event-1")


async def test_transactions_at_once_make_one_key(desk: Database, keys: SubjectKeys) -> None:
    subject = uuid4().hex

    async def seal(n: int) -> bytes:
        async with desk.begin() as tx:
            return (await keys.key(tx, "t1", subject)).seal(str(n))

    sealed = await asyncio.gather(*(seal(n) for n in range(8)))
    async with desk.begin() as tx:
        key = await keys.key(tx, "t1", subject)
        assert [key.open(one) for one in sealed] == [str(n) for n in range(8)]


async def test_a_key_is_stored_sealed_for_its_subject(desk: Database, keys: SubjectKeys) -> None:
    mine, other = uuid4().hex, uuid4().hex
    async with desk.begin() as tx:
        await keys.key(tx, "t1", mine)
        await keys.key(tx, "t1", other)
        await tx.sql(
            "UPDATE subject_key SET wrapped = (SELECT wrapped FROM subject_key WHERE subject_id = $1) "
            "WHERE subject_id = $2",
            other,
            mine,
        )
        with pytest.raises(InvalidMessage):
            await keys.key(tx, "t1", mine)


async def test_an_erased_subject_stays_erased_for_every_process(desk: Database, keys: SubjectKeys) -> None:
    subject, neighbour = uuid4().hex, uuid4().hex
    async with desk.begin() as tx:
        await keys.key(tx, "t1", subject)
        await keys.key(tx, "t2", subject)
        await keys.key(tx, "t1", neighbour)
    for _ in range(2):
        await erase(desk, "t1", subject)
    async with desk.begin() as tx:
        with pytest.raises(Erased):
            await keys.key(tx, "t1", subject)
        await keys.key(tx, "t2", subject)
        await keys.key(tx, "t1", neighbour)
        [(wrapped, destroyed_at)] = await tx.sql(
            "SELECT wrapped, destroyed_at FROM subject_key WHERE tenant_id = 't1' AND subject_id = $1", subject
        )
        assert wrapped is None
        assert destroyed_at is not None


async def test_a_message_that_comes_after_the_erasure_makes_no_key(desk: Database, keys: SubjectKeys) -> None:
    subject = uuid4().hex
    await erase(desk, "t1", subject)
    async with desk.begin() as tx:
        with pytest.raises(Erased):
            await keys.key(tx, "t1", subject)


async def test_an_erased_tenant_has_no_keys_and_gets_no_new_ones(desk: Database, keys: SubjectKeys) -> None:
    erased, neighbour, subject = uuid4().hex, uuid4().hex, uuid4().hex
    async with desk.begin() as tx:
        await keys.key(tx, erased, subject)
        sealed = (await keys.key(tx, neighbour, subject)).seal("hello")
    for _ in range(2):
        async with desk.begin() as tx:
            await destroy_all(tx, erased)
    async with desk.begin() as tx:
        for one in (subject, uuid4().hex):
            with pytest.raises(Erased):
                await keys.key(tx, erased, one)
        assert (await keys.key(tx, neighbour, subject)).open(sealed) == "hello"
