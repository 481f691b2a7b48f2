"""The ledger of calls, in this process: take-over by another process, expired leases, retries, and errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from infra.errors import EffectFailed, RetryLater, Transient, Unanswered
from infra.postgres.database import Database
from infra.postgres.db import Pool, create_engine
from infra.postgres.schema import role_url
from infra.security import subjects
from infra.security.crypto import Cipher
from services.plugin.calls import Calls, run_tool
from services.plugin.domain import MAX_RESULT_BYTES, CallOutcome, Effect, Tool, ToolOutput, ToolRequest
from services.plugin.registry import Offered
from tooling.testing.platform import MASTER_KEY, PASSWORDS, Platform

Do = Callable[[int], Awaitable[Any]]


class Tools:
    """A tool that runs the given function. `count`: the number of its runs."""

    def __init__(self, do: Do) -> None:
        self._do = do
        self.count = 0

    async def run(self, offer: Offered, call: ToolRequest) -> ToolOutput:
        self.count += 1
        return ToolOutput(await self._do(self.count))


@pytest.fixture(scope="module")
async def engine(platform: Platform) -> AsyncIterator[Pool]:
    await platform.prepare("plugin")
    engine = create_engine(role_url(platform.database_url, "plugin", "request", PASSWORDS.request), pool_size=5)
    yield engine
    await engine.dispose()


def calls(engine: Pool, do: Do, *, lease: float = 30) -> Calls:
    database = Database(engine, "plugin", tenanted=True)
    return Calls(database, Cipher(MASTER_KEY), Tools(do), timedelta(seconds=lease))  # type: ignore[arg-type]


def calculator(key: str, seconds: float = 10) -> ToolRequest:
    return ToolRequest("acme", "calculator", {"expression": "1"}, key, seconds)


async def run(do: Do, effect: Effect = "repeatable", *, seconds: float = 10) -> tuple[CallOutcome, int]:
    """Returns the outcome and the number of the tool's runs."""
    tools = Tools(do)
    offer = Offered(Tool("x", "", {"type": "object"}, effect), None, "x")
    outcome = await run_tool(tools, offer, ToolRequest("acme", "x", {}, "k", seconds))  # type: ignore[arg-type]
    return outcome, tools.count


async def test_a_process_that_lost_its_lease_does_not_overwrite_the_outcome_of_its_successor(
    platform: Platform, engine: Pool
) -> None:
    begun, released = asyncio.Event(), asyncio.Event()

    async def stopped(_: int) -> str:
        begun.set()
        await released.wait()
        return "of the one that was stopped"

    async def other(_: int) -> str:
        return "of the other"

    first = asyncio.create_task(calls(engine, stopped).call(calculator("stopped")))
    await begun.wait()
    async with platform.database("plugin").begin() as tx:
        await tx.sql("UPDATE tool_call SET leased_until = now() - interval '1 second' WHERE key = 'stopped'")
    taken_over = await calls(engine, other).call(calculator("stopped"))
    released.set()
    with pytest.raises(Transient):
        await first
    assert taken_over == CallOutcome("succeeded", '"of the other"')
    assert await calls(engine, stopped).call(calculator("stopped")) == taken_over
    records = [body["usage_id"] for _, body in await platform.outbox("plugin", "usage.records")]
    assert [id_ for id_ in records if id_.startswith("stopped/")] == ["stopped/tool/1", "stopped/tool/2"]


async def test_a_lease_is_renewed_for_as_long_as_the_tool_takes(engine: Pool) -> None:
    lease = 0.6
    begun, released = asyncio.Event(), asyncio.Event()

    async def long(_: int) -> str:
        begun.set()
        await released.wait()
        return "done"

    async def never(_: int) -> str:
        raise AssertionError("it was taken over")

    first = asyncio.create_task(calls(engine, long, lease=lease).call(calculator("long")))
    await begun.wait()
    # Another caller asks for the same call, for the length of several leases.
    with pytest.raises(Transient, match="still running"):
        await calls(engine, never).call(calculator("long", seconds=5 * lease))
    released.set()
    assert await first == CallOutcome("succeeded", '"done"')


async def test_old_calls_are_deleted(platform: Platform, engine: Pool) -> None:
    async def work(count: int) -> int:
        return count

    ledger = calls(engine, work)
    await ledger.call(calculator("old"))
    async with platform.database("plugin").begin() as tx:
        await tx.sql("UPDATE tool_call SET created_at = now() - interval '8 days' WHERE key = 'old'")
    await ledger.call(calculator("new"))
    async with platform.database("plugin").begin() as tx:
        keys = {key for (key,) in await tx.sql("SELECT key FROM tool_call")}
    assert "new" in keys
    assert "old" not in keys


async def test_a_request_that_did_not_arrive_is_sent_again_a_few_times() -> None:
    async def twice_away(count: int) -> int:
        if count < 3:
            raise Transient("connection refused")
        return count

    async def away(_: int) -> None:
        raise Transient("connection refused")

    async def later(_: int) -> None:
        raise RetryLater(timedelta(hours=1), "HTTP 503")

    for effect in ("repeatable", "keyed", "once"):
        assert await run(twice_away, effect) == (CallOutcome("succeeded", "3"), 3)
        assert await run(away, effect) == (CallOutcome("failed", error="connection refused"), 3)
        # The caller does not wait if the pause would exceed its time.
        assert await run(later, effect, seconds=1800) == (CallOutcome("failed", error="HTTP 503"), 1)


async def test_a_request_that_may_have_arrived_is_sent_again_only_if_a_repeat_is_harmless() -> None:
    async def cut_off(_: int) -> None:
        raise Unanswered("connection lost")

    assert [(await run(cut_off, effect))[1] for effect in ("repeatable", "keyed", "once")] == [3, 3, 1]
    assert [(await run(cut_off, effect))[0].state for effect in ("repeatable", "keyed", "once")] == [
        "failed",
        "unknown",
        "unknown",
    ]


async def test_a_call_that_could_not_be_sent_in_its_time_has_failed_and_is_not_unknown() -> None:
    async def busy(_: int) -> None:
        raise RetryLater(timedelta(seconds=0.3), "HTTP 429")

    assert await run(busy, "once", seconds=0.5) == (CallOutcome("failed", error="HTTP 429"), 2)


async def test_errors_and_results_that_are_too_large_are_outcomes() -> None:
    async def refusing(_: int) -> None:
        raise EffectFailed("no such customer")

    async def broken(_: int) -> None:
        raise KeyError("a bug of ours")

    async def just_fits(_: int) -> str:
        return "x" * (MAX_RESULT_BYTES - 2)

    async def too_large(_: int) -> str:
        return "x" * (MAX_RESULT_BYTES - 1)

    assert await run(refusing) == (CallOutcome("failed", error="no such customer"), 1)
    assert await run(broken) == (CallOutcome("failed", error="internal error of the plugin service"), 1)
    assert (await run(just_fits))[0].state == "succeeded"
    outcome, _ = await run(too_large)
    assert (outcome.state, outcome.result) == ("failed", "")
    assert "too large" in outcome.error


async def test_an_outcome_is_sealed_for_its_person_and_unreadable_after_the_erasure(
    platform: Platform, engine: Pool
) -> None:
    async def answer(_: int) -> str:
        return "canary"

    ledger = calls(engine, answer)
    call = calculator("personal")._replace(subject_id="ann")
    assert (await ledger.call(call)).result == '"canary"'
    assert (await ledger.call(call)).result == '"canary"', "a repeat gets the outcome of the ledger"
    async with platform.database("plugin").begin() as tx:
        await subjects.destroy(tx, "acme", "ann")
    erased = await ledger.call(call)
    assert (erased.state, erased.error) == ("failed", "the person of this call was erased")
    late = await ledger.call(calculator("late")._replace(subject_id="ann"))
    assert late.result == '"canary"', "the call itself succeeds; only its outcome is not stored"
    async with platform.database("plugin").begin() as tx:
        assert await tx.sql("SELECT outcome FROM tool_call WHERE key = 'late'") == [(None,)]
