"""A message that no bus can carry does not get into the outbox."""

from __future__ import annotations

import pytest

from infra.clock import uuid7
from infra.errors import TooLarge
from infra.postgres.database import Database
from infra.postgres.tx import MAX_MESSAGE_BYTES
from protos.messages.sample import NoteTaken, TakeNote
from tooling.testing.sample.catalog import SAMPLE_EVENTS, SAMPLE_WORK


def text_for(kind: type[NoteTaken] | type[TakeNote], bytes_over: int) -> str:
    around = len('{"notebook":"n","text":""}') if kind is TakeNote else len('{"notebook":"n","number":1,"text":""}')
    return "x" * (MAX_MESSAGE_BYTES - around + bytes_over)


async def test_a_message_at_the_limit_is_taken_and_a_larger_one_fails_its_transaction(desk: Database) -> None:
    fact, work = uuid7(), uuid7()
    async with desk.begin() as tx:
        tx.publish(
            SAMPLE_EVENTS, NoteTaken(notebook="n", number=1, text=text_for(NoteTaken, 0)), key="n", message_id=fact
        )
        tx.send(SAMPLE_WORK, TakeNote(notebook="n", text=text_for(TakeNote, 0)), message_id=work)
    async with desk.begin() as tx:
        rows = await tx.sql("SELECT octet_length(body) FROM outbox WHERE message_id = ANY($1)", [fact, work])
    assert rows == [(MAX_MESSAGE_BYTES,)] * 2

    with pytest.raises(TooLarge, match=r"sample\.v1\.NoteTaken: has 1000001 bytes; a message may have 1000000"):
        async with desk.begin() as tx:
            tx.publish(SAMPLE_EVENTS, NoteTaken(notebook="n", number=1, text="small"), key="n", message_id=uuid7())
            tx.publish(SAMPLE_EVENTS, NoteTaken(notebook="n", number=1, text=text_for(NoteTaken, 1)), key="n")
    with pytest.raises(TooLarge, match=r"sample\.v1\.TakeNote"):
        async with desk.begin() as tx:
            tx.send(SAMPLE_WORK, TakeNote(notebook="n", text=text_for(TakeNote, 1)))
    async with desk.begin() as tx:
        assert await tx.sql("SELECT count(*) FROM outbox WHERE octet_length(body) <> $1", MAX_MESSAGE_BYTES) == [(0,)]
