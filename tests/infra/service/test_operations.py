"""The operations gRPC: dead letters and the outbox of one service, for all tenants or for one."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry

from infra.clock import uuid7
from infra.errors import Forbidden, InvalidMessage, NotFound
from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from infra.postgres.dead_letters import DeadLetter, store_dead_letters
from infra.service import operations
from infra.web import rpc
from infra.web.health import Health
from infra.web.rpc_client import Channels
from protos.messages.sample import NoteTaken
from protos.ops.v1 import ops_pb2, ops_pb2_grpc
from tooling.testing import keys
from tooling.testing.sample.catalog import SAMPLE_EVENTS


@pytest.fixture
async def address(desk: Database) -> AsyncIterator[str]:
    server = rpc.Server("desk", keys.callers("desk"), Metrics(CollectorRegistry()))
    add, servicer = operations.servicer(desk, Health("desk", "1.0"))
    add(servicer, server.grpc)
    port = await server.start(0)
    yield f"127.0.0.1:{port}"
    await server.stop()


@pytest.fixture
async def stub(address: str) -> AsyncIterator[ops_pb2_grpc.OperationsStub]:
    channels = Channels(keys.callers("log_aggregator"))
    yield ops_pb2_grpc.OperationsStub(channels.to(address, "desk"))
    await channels.close()


async def failed(desk: Database, tenant: str | None) -> str:
    message_id = str(uuid7())
    letter = DeadLetter(
        destination="sample.work",
        place="",
        message_id=message_id,
        key=None,
        tenant_id=tenant,
        attempts=3,
        error="notebook: is empty",
        headers='{"ce_id": "x"}',
        payload=b"\xff{}",
    )
    async with desk.begin() as tx:
        await store_dead_letters(await tx.connection(), "sample_desk", "rabbit", [letter], desk.sealing)
        [(id_,)] = await tx.sql("SELECT id::text FROM dead_letter WHERE message_id = $1", message_id)
    return str(id_)


async def test_a_dead_letter_is_listed_read_and_discarded_and_the_audit_names_the_operator(
    stub: ops_pb2_grpc.OperationsStub, desk: Database
) -> None:
    id_ = await failed(desk, "t1")
    listed = (await stub.ListDeadLetters(ops_pb2.ListDeadLettersRequest())).items
    assert [(letter.id, letter.payload) for letter in listed if letter.id == id_] == [(id_, "")]
    read = await stub.GetDeadLetter(ops_pb2.GetDeadLetterRequest(id=id_))
    assert (read.service, read.source, read.payload, read.error) == (
        "sample_desk",
        "rabbit:sample.work",
        "\\xff{}",
        "notebook: is empty",
    )
    await stub.DiscardDeadLetter(ops_pb2.DiscardDeadLetterRequest(id=id_, actor="api_key:k1"))
    async with desk.begin() as tx:
        rows = await tx.sql("SELECT convert_from(body, 'UTF8') FROM outbox WHERE destination = 'audit.logs'")
    assert sum(id_ in body and "api_key:k1" in body for (body,) in rows) == 1
    assert id_ not in [letter.id for letter in (await stub.ListDeadLetters(ops_pb2.ListDeadLettersRequest())).items]


async def test_a_tenant_neither_sees_nor_changes_another_tenants_dead_letters(
    stub: ops_pb2_grpc.OperationsStub, desk: Database
) -> None:
    mine, other, platforms = await failed(desk, "t1"), await failed(desk, "t2"), await failed(desk, None)
    as_t1 = rpc.tenant_metadata("t1")
    listed = (await stub.ListDeadLetters(ops_pb2.ListDeadLettersRequest(), metadata=as_t1)).items
    assert {letter.tenant_id for letter in listed} == {"t1"}
    for id_ in (other, platforms):
        with pytest.raises(NotFound):
            await stub.GetDeadLetter(ops_pb2.GetDeadLetterRequest(id=id_), metadata=as_t1)
        with pytest.raises(NotFound):
            await stub.DiscardDeadLetter(ops_pb2.DiscardDeadLetterRequest(id=id_), metadata=as_t1)
        with pytest.raises(NotFound):
            await stub.RedriveDeadLetters(ops_pb2.RedriveDeadLettersRequest(ids=[id_]), metadata=as_t1)
    # Without ids it means all failed dead letters of this tenant.
    reply = await stub.RedriveDeadLetters(ops_pb2.RedriveDeadLettersRequest(), metadata=as_t1)
    assert reply.redriven == 1
    states = {
        letter.id: letter.state for letter in (await stub.ListDeadLetters(ops_pb2.ListDeadLettersRequest())).items
    }
    assert (states[mine], states[other], states[platforms]) == ("redriving", "failed", "failed")


async def test_the_outbox_is_counted_by_message_published_or_not_and_by_tenant(address: str, desk: Database) -> None:
    for key, notes in (("t1", 3), ("t2", 2)):
        async with desk.begin(tenant_id=key) as tx:
            for n in range(notes):
                tx.publish(SAMPLE_EVENTS, NoteTaken(notebook="n", number=n, text=""), key=key)
    async with desk.begin() as tx:
        await tx.sql(
            "UPDATE outbox SET published_at = now() WHERE position = "
            "(SELECT min(position) FROM outbox WHERE destination = $1)",
            SAMPLE_EVENTS.name,
        )
    request = ops_pb2.CountOutboxRequest(topic=SAMPLE_EVENTS.name)
    channels = Channels(keys.callers("billing"))
    stub = ops_pb2_grpc.OperationsStub(channels.to(address, "desk"))
    everything = await stub.CountOutbox(request)
    assert (everything.produced, everything.published, everything.pending) == (5, 1, 4)
    assert (await stub.CountOutbox(request, metadata=rpc.tenant_metadata("t2"))).produced == 2
    with pytest.raises(Forbidden, match="billing must not call"):
        await stub.GetDeadLetter(ops_pb2.GetDeadLetterRequest(id=str(uuid7())))
    await channels.close()


async def test_a_malformed_id_is_named(stub: ops_pb2_grpc.OperationsStub) -> None:
    with pytest.raises(InvalidMessage, match="id: must be a UUID"):
        await stub.GetDeadLetter(ops_pb2.GetDeadLetterRequest(id="7"))
