"""A channel's messages are answered in the order in which they were written, not in the order of arrival."""

from __future__ import annotations

from tests.services.agent.conftest import Tenant, World


async def parked(world: World, tenant: Tenant, count: int) -> None:
    """Waits until `count` of the tenant's messages wait for earlier ones."""

    async def so_many() -> bool:
        async with world.platform.database("agent").begin() as tx:
            [(found,)] = await tx.sql("SELECT count(*) FROM early_message WHERE tenant_id = $1", tenant.id)
        return bool(found == count)

    await world.platform.until(so_many)


async def answered(tenant: Tenant, count: int) -> list[str]:
    await tenant.runs(count)
    return [send["text"] for send in await tenant.sent("channel.outbound")]


async def test_messages_that_come_too_early_wait_for_those_before_them(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(queue_mode="followup")
    await tenant.receive(agent, "three", position=3)
    await tenant.receive(agent, "two", position=2)
    await parked(world, tenant, 2)
    assert (await tenant.call("GET", "/api/v1/runs"))["items"] == []
    async with world.platform.database("agent").begin() as tx:
        stored = await tx.sql("SELECT parcel FROM early_message WHERE tenant_id = $1", tenant.id)
    assert not any(b"three" in bytes(sealed) for (sealed,) in stored)
    await tenant.receive(agent, "one", position=1)
    assert await answered(tenant, 3) == ["You said: one", "You said: two", "You said: three"]
    # Replies carry positions of their own, because the queue to the channel keeps no order.
    assert [send["position"] for send in await tenant.sent("channel.outbound")] == [1, 2, 3]
    await tenant.receive(agent, "four", position=4)
    assert (await answered(tenant, 4))[3:] == ["You said: four"]
    await parked(world, tenant, 0)


async def test_messages_that_are_dead_letters_are_not_waited_for(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(queue_mode="followup")
    await tenant.receive(agent, "three", position=3)
    await tenant.receive(agent, "four", position=4)
    await parked(world, tenant, 2)
    async with world.platform.database("agent").begin() as tx:
        await tx.sql(
            """
            INSERT INTO dead_letter (id, consumer, source, destination, place, message_id, key, tenant_id, state,
                attempts, error, headers, payload)
            SELECT gen_random_uuid(), 'q', 'rabbit', 'q', '', n::text, $2, $1, 'failed', 5, '',
                json_build_object('ce_sequence', n::text)::text, ''
            FROM generate_series(1, 2) n
            """,
            tenant.id,
            f"{tenant.id}-c",
        )
        # As if the grace period were over.
        await tx.sql(
            "UPDATE lane_item SET not_before = now() "
            "WHERE kind = 'message gaps' AND state = 'waiting' AND tenant_id = $1",
            tenant.id,
        )
        await tx.sql("UPDATE lane SET ready_at = now() WHERE kind = 'message gaps' AND tenant_id = $1", tenant.id)
    assert await answered(tenant, 2) == ["You said: three", "You said: four"]
    # The late message is not lost.
    await tenant.receive(agent, "one", position=1)
    assert (await answered(tenant, 3))[2:] == ["You said: one"]
    await tenant.receive(agent, "five", position=5)
    assert (await answered(tenant, 4))[3:] == ["You said: five"]


async def test_conversations_do_not_wait_for_each_other(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    await tenant.receive(agent, "two", position=2)
    await tenant.receive(agent, "one", position=1, chat="other")
    assert await answered(tenant, 1) == ["You said: one"]


async def test_a_message_that_waited_is_answered_in_its_own_trace(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(queue_mode="followup")
    traces = [f"{n:032x}" for n in (0xA1, 0xA2)]
    await tenant.receive(agent, "two", position=2, trace_id=traces[1])
    await parked(world, tenant, 1)
    await tenant.receive(agent, "one", position=1, trace_id=traces[0])
    assert [run["trace_id"] for run in await tenant.runs(2)] == traces
