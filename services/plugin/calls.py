"""Calls of tools, each run once per key: the ledger says what came of it, to whoever asks again.

*Started* is committed before the tool is called, the outcome after it. Whoever runs a call renews a lease on it; a
call whose lease ran out was left by a process that died, and what then is right depends on the tool's effect. The
ledger is synchronous, the caller waits for the answer; so it is not a lane.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import NamedTuple

import msgspec

from infra.clock import utcnow
from infra.errors import EffectFailed, InvalidMessage, NotFound, RetryLater, TooLarge, Transient, Unanswered
from infra.observe.logs import get_logger
from infra.postgres.db import is_transient
from infra.postgres.tx import Database, Tx
from infra.security.crypto import Cipher
from infra.web.json_schema import check
from protos.catalog import USAGE_RECORDS
from protos.messages.billing import UsageRecorded
from services.plugin import registry
from services.plugin.domain import MAX_RESULT_BYTES, Call, Outcome, Recorded, next_step, without_answer
from services.plugin.registry import Offered
from services.plugin.tools.running import Tools

POLL_SECONDS = 0.2
# Before a tool that could not be reached, or cut its answer off, is called again.
PAUSES = (0.2, 1.0)
# Longer than anybody asks again, and no longer: what a tool has answered may be personal.
KEEP = timedelta(days=7)

_log = get_logger("plugin.calls")


class Begun(NamedTuple):
    """This process runs the call, as its attempt number `attempt`."""

    offer: Offered
    attempt: int


class Calls:
    """`database`: the request role's. `lease`: a call that nobody renews for so long was left."""

    def __init__(self, database: Database, cipher: Cipher, tools: Tools, lease: timedelta) -> None:
        self._database = database
        self._cipher = cipher
        self._tools = tools
        self._lease = lease
        self._running: set[asyncio.Task[Outcome]] = set()

    async def call(self, call: Call) -> Outcome:
        """The call's outcome: of the tool, or saved from before.

        It goes on where the caller goes away: asked again, it has its outcome. Raises NotFound where the tenant has no
        such tool, InvalidMessage where the arguments do not fit or the key was used for another call, Transient where
        the same call is still running when the time is over.
        """
        task = asyncio.create_task(self._call(call))
        self._running.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[Outcome]) -> None:
        self._running.discard(task)
        # Or asyncio complains of what nobody was there to hear.
        if not task.cancelled():
            task.exception()

    async def _call(self, call: Call) -> Outcome:
        deadline = time.monotonic() + call.seconds
        while True:
            async with self._database.begin(tenant_id=call.tenant_id) as tx:
                step = await self._begin(tx, call)
            if isinstance(step, Outcome):
                return step
            if isinstance(step, Begun):
                return await self._run(call, step, deadline)
            if time.monotonic() > deadline:
                raise Transient("the same call is still running")
            await asyncio.sleep(POLL_SECONDS)

    async def _begin(self, tx: Tx, call: Call) -> Outcome | Begun | None:
        """The outcome where there is one; None where somebody else is at it."""
        digest = _digest(call)
        rows = await tx.sql(
            "SELECT request_hash, state, attempt, leased_until < clock_timestamp(), outcome FROM tool_call "
            "WHERE tenant_id = $1 AND key = $2 FOR UPDATE",
            call.tenant_id,
            call.key,
        )
        recorded = Recorded(*rows[0][1:4]) if rows else None
        if rows and rows[0][0] != digest:
            raise InvalidMessage("idempotency_key", "was used before with another tool or other arguments")
        if recorded and recorded.state != "started":
            return self._open(rows[0][4], call)
        found = await registry.offered(tx, [call.tool])
        if not found:
            raise NotFound(f"tool {call.tool}: there is none")
        [offer] = found
        match next_step(recorded, offer.tool.effect):
            case "wait":
                return None
            case "give up":
                outcome = without_answer(offer.tool.effect, "the process that ran it died")
                await self._end(tx, call, recorded.attempt if recorded else 1, outcome)
                return outcome
            case _:
                check("arguments", offer.tool.schema, call.arguments)
                return await self._start(tx, call, digest, offer, recorded)

    async def _start(
        self, tx: Tx, call: Call, digest: bytes, offer: Offered, recorded: Recorded | None
    ) -> Begun | None:
        if recorded:
            # The attempt that was left may have reached the tool.
            _use(tx, call, recorded.attempt)
            await tx.sql(
                "UPDATE tool_call SET attempt = attempt + 1, leased_until = clock_timestamp() + $3 "
                "WHERE tenant_id = $1 AND key = $2",
                call.tenant_id,
                call.key,
                self._lease,
            )
            return Begun(offer, recorded.attempt + 1)
        # Old ones go a few at a time, with those that come.
        await tx.sql(
            "DELETE FROM tool_call WHERE tenant_id = $1 AND key IN (SELECT key FROM tool_call WHERE tenant_id = $1 "
            "AND created_at < clock_timestamp() - $2::interval ORDER BY created_at LIMIT 10 FOR UPDATE SKIP LOCKED)",
            call.tenant_id,
            KEEP,
        )
        inserted = await tx.sql(
            "INSERT INTO tool_call (tenant_id, key, request_hash, tool, state, attempt, leased_until) "
            "VALUES ($1, $2, $3, $4, 'started', 1, clock_timestamp() + $5) ON CONFLICT DO NOTHING RETURNING key",
            call.tenant_id,
            call.key,
            digest,
            call.tool,
            self._lease,
        )
        return Begun(offer, 1) if inserted else None

    async def _run(self, call: Call, begun: Begun, deadline: float) -> Outcome:
        async with self._leased(call, begun.attempt):
            left = call._replace(seconds=max(0.0, deadline - time.monotonic()))
            outcome = await run_tool(self._tools, begun.offer, left)
        async with self._database.begin(tenant_id=call.tenant_id) as tx:
            await self._end(tx, call, begun.attempt, outcome)
        return outcome

    async def _end(self, tx: Tx, call: Call, attempt: int, outcome: Outcome) -> None:
        ended = await tx.sql(
            "UPDATE tool_call SET state = $4, outcome = $5, ended_at = clock_timestamp() "
            "WHERE tenant_id = $1 AND key = $2 AND attempt = $3 AND state = 'started' RETURNING key",
            call.tenant_id,
            call.key,
            attempt,
            outcome.state,
            self._cipher.seal(msgspec.json.encode(outcome), "tool outcome", call.tenant_id, call.key),
        )
        if not ended:
            # This process was stopped for longer than its lease.
            raise Transient("somebody else has taken the call over")
        _use(tx, call, attempt)

    def _open(self, sealed: bytes, call: Call) -> Outcome:
        content = self._cipher.open(bytes(sealed), "tool outcome", call.tenant_id, call.key)
        return msgspec.json.decode(content, type=Outcome)

    @asynccontextmanager
    async def _leased(self, call: Call, attempt: int) -> AsyncIterator[None]:
        async def renew() -> None:
            while True:
                await asyncio.sleep(self._lease.total_seconds() / 3)
                try:
                    async with self._database.begin(tenant_id=call.tenant_id) as tx:
                        await tx.sql(
                            "UPDATE tool_call SET leased_until = clock_timestamp() + $4 "
                            "WHERE tenant_id = $1 AND key = $2 AND attempt = $3 AND state = 'started'",
                            call.tenant_id,
                            call.key,
                            attempt,
                            self._lease,
                        )
                except Exception as error:
                    # The next one may come through in time; if not, the call is taken over, and `_end` says so.
                    _log.warning("lease not renewed", error=type(error).__name__, exc_info=not is_transient(error))

        task = asyncio.create_task(renew())
        try:
            yield
        finally:
            task.cancel()


async def run_tool(tools: Tools, offer: Offered, call: Call) -> Outcome:
    """Runs the tool, again where that does no harm, until `call.seconds` are over. Whatever happens is an outcome."""
    effect = offer.tool.effect
    deadline = time.monotonic() + call.seconds
    try:
        async with asyncio.timeout(call.seconds):
            for pause in (*PAUSES, None):
                try:
                    result = msgspec.json.encode(await tools.run(offer, call))
                    if len(result) > MAX_RESULT_BYTES:
                        raise TooLarge(f"result: more than {MAX_RESULT_BYTES} bytes")
                    return Outcome("succeeded", result.decode())
                except Transient as error:
                    if pause is None:
                        raise
                    after = error.after.total_seconds() if isinstance(error, RetryLater) else pause
                    if time.monotonic() + after > deadline:
                        raise  # and not in the pause, as if the tool had not answered
                    await asyncio.sleep(after)
                except Unanswered:
                    if pause is None or effect == "once":
                        raise
                    await asyncio.sleep(pause)
            raise AssertionError("unreachable")
    except EffectFailed as error:
        return Outcome("failed", error=error.reason)
    except TooLarge as error:
        return Outcome("failed", error=f"too large: {error}")
    except (InvalidMessage, Transient) as error:
        return Outcome("failed", error=str(error))
    except Unanswered as error:
        return without_answer(effect, f"no answer: {error}")
    except TimeoutError:
        return without_answer(effect, f"no answer within {call.seconds:.1f} s")
    except Exception as error:
        # Where, and not what it says: a library's error repeats what the tool has answered.
        where = traceback.format_tb(error.__traceback__)[-5:]
        _log.error("tool failed by an error of ours", tool=call.tool, error=type(error).__name__, where=where)
        return without_answer(effect, "an error inside the plugin service")


def _use(tx: Tx, call: Call, attempt: int) -> None:
    record = UsageRecorded(
        tenant_id=call.tenant_id,
        usage_id=f"{call.key}/tool/{attempt}",
        resource=f"tool/{call.tool}",
        quantities={"calls": 1},
        occurred_at=utcnow(),
    )
    tx.publish(USAGE_RECORDS, record, key=call.tenant_id)


def _digest(call: Call) -> bytes:
    return hashlib.sha256(msgspec.json.encode([call.tool, call.arguments], order="sorted")).digest()
