"""Calls of tools. Each call runs once per key; a repeated request gets the outcome from the ledger.

*Started* is committed before the tool is called, the outcome after it. The process that runs a call renews a lease on
it. If the lease expires, that process has died, and the tool's effect decides how the call continues. The caller waits
for the answer, so the ledger is not a lane.
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
from uuid import UUID

import msgspec

from infra.clock import utcnow
from infra.errors import EffectFailed, InvalidMessage, NotFound, RetryLater, TooLarge, Transient, Unanswered
from infra.observe.logs import get_logger
from infra.postgres.database import Database
from infra.postgres.db import is_transient
from infra.postgres.tx import Tx
from infra.security.crypto import Cipher
from infra.security.rewrap import SealedColumn
from infra.security.subjects import Erased, SubjectKeys
from infra.web.json_schema import check
from protos.catalog import USAGE_RECORDS
from protos.messages.billing import UsageRecorded
from services.plugin import registry
from services.plugin.domain import MAX_RESULT_BYTES, CallOutcome, RecordedCall, ToolRequest, next_action, without_answer
from services.plugin.registry import Offered
from services.plugin.runner import ToolRunner

POLL_SECONDS = 0.2
# Pauses before the retries of a tool that could not be reached or whose answer was cut off.
PAUSES = (0.2, 1.0)
# Longer than any caller repeats a request. Not longer, because the answer of a tool may contain personal data.
KEEP = timedelta(days=7)
SEALED = SealedColumn("tool_call", "outcome", "tool outcome", ("tenant_id", "key"), where="subject_id = ''")

_log = get_logger("plugin.calls")


class StartedCall(NamedTuple):
    """A call that this process runs, as attempt number `attempt`."""

    offer: Offered
    attempt: int


class Calls:
    """Runs calls, with the database of the request role. A call whose lease is not renewed for `lease` is abandoned."""

    def __init__(self, database: Database, cipher: Cipher, tools: ToolRunner, lease: timedelta) -> None:
        self._database = database
        self._cipher = cipher
        self._subjects = SubjectKeys(cipher)
        self._tools = tools
        self._lease = lease
        self._running: set[asyncio.Task[CallOutcome]] = set()

    async def call(self, call: ToolRequest) -> CallOutcome:
        """Returns the call's outcome, from the tool or from the ledger.

        If the caller disconnects, the call continues, and a repeated request gets its outcome. Raises NotFound if the
        tenant does not have the tool, InvalidMessage if the arguments do not match the schema or the key was used for
        another call, and Transient if the same call is still running at the end of the caller's time.
        """
        task = asyncio.create_task(self._call(call))
        self._running.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[CallOutcome]) -> None:
        self._running.discard(task)
        # Otherwise asyncio logs an error that was never retrieved, if the caller has disconnected.
        if not task.cancelled():
            task.exception()

    async def _call(self, call: ToolRequest) -> CallOutcome:
        deadline = time.monotonic() + call.seconds
        while True:
            async with self._database.begin(tenant_id=call.tenant_id) as tx:
                begun = await self._begin(tx, call)
            if isinstance(begun, CallOutcome):
                return begun
            if isinstance(begun, StartedCall):
                return await self._run(call, begun, deadline)
            if time.monotonic() > deadline:
                raise Transient("the same call is still running")
            await asyncio.sleep(POLL_SECONDS)

    async def _begin(self, tx: Tx, call: ToolRequest) -> CallOutcome | StartedCall | None:
        """Returns the recorded outcome, or the call that this process has started. None: another process runs it."""
        digest = _digest(call)
        rows = await tx.sql(
            """
            SELECT request_hash, state, attempt, leased_until < clock_timestamp(), outcome, subject_id
            FROM tool_call WHERE tenant_id = $1 AND key = $2 FOR UPDATE
            """,
            call.tenant_id,
            call.key,
        )
        recorded = RecordedCall(*rows[0][1:4]) if rows else None
        if rows and rows[0][0] != digest:
            raise InvalidMessage("idempotency_key", "was used before with another tool or other arguments")
        if recorded and recorded.state != "started":
            return await self._open(tx, rows[0][4], rows[0][5], call)
        found = await registry.offered(tx, [call.tool])
        if not found:
            raise NotFound(f"tool {call.tool}: not found")
        [offer] = found
        match next_action(recorded, offer.tool.effect):
            case "wait":
                return None
            case "give up":
                outcome = without_answer(offer.tool.effect, "the process that ran it died")
                await self._end(tx, call, recorded.attempt if recorded else 1, outcome)
                return outcome
            case _:
                # In a thread, as a schema may ask for much work.
                await asyncio.to_thread(check, "arguments", offer.tool.schema, call.arguments)
                return await self._start(tx, call, digest, offer, recorded)

    async def _start(
        self, tx: Tx, call: ToolRequest, digest: bytes, offer: Offered, recorded: RecordedCall | None
    ) -> StartedCall | None:
        if recorded:
            # The abandoned attempt may have reached the tool.
            _publish_usage(tx, call, recorded.attempt)
            await tx.sql(
                """
                UPDATE tool_call SET attempt = attempt + 1, leased_until = clock_timestamp() + $3
                WHERE tenant_id = $1 AND key = $2
                """,
                call.tenant_id,
                call.key,
                self._lease,
            )
            return StartedCall(offer, recorded.attempt + 1)
        # Each new call deletes a few old ones, so that no separate job is needed.
        await tx.sql(
            # Locks the calls that it deletes; those that another process deletes are skipped.
            """
            DELETE FROM tool_call
            WHERE tenant_id = $1 AND key IN (
                SELECT key FROM tool_call
                WHERE tenant_id = $1 AND created_at < clock_timestamp() - $2::interval
                ORDER BY created_at
                LIMIT 10
                FOR UPDATE SKIP LOCKED
            )
            """,
            call.tenant_id,
            KEEP,
        )
        inserted = await tx.sql(
            """
            INSERT INTO tool_call (tenant_id, key, request_hash, tool, state, attempt, leased_until, subject_id)
            VALUES ($1, $2, $3, $4, 'started', 1, clock_timestamp() + $5, $6) ON CONFLICT DO NOTHING RETURNING key
            """,
            call.tenant_id,
            call.key,
            digest,
            call.tool,
            self._lease,
            call.subject_id,
        )
        return StartedCall(offer, 1) if inserted else None

    async def _run(self, call: ToolRequest, begun: StartedCall, deadline: float) -> CallOutcome:
        async with self._leased(call, begun.attempt):
            left = call._replace(seconds=max(0.0, deadline - time.monotonic()))
            outcome = await run_tool(self._tools, begun.offer, left)
        async with self._database.begin(tenant_id=call.tenant_id) as tx:
            await self._end(tx, call, begun.attempt, outcome)
        return outcome

    async def _end(self, tx: Tx, call: ToolRequest, attempt: int, outcome: CallOutcome) -> None:
        ended = await tx.sql(
            """
            UPDATE tool_call SET state = $4, outcome = $5, ended_at = clock_timestamp()
            WHERE tenant_id = $1 AND key = $2 AND attempt = $3 AND state = 'started' RETURNING key
            """,
            call.tenant_id,
            call.key,
            attempt,
            outcome.state,
            await self._seal(tx, outcome, call),
        )
        if not ended:
            # This process was suspended for longer than its lease.
            raise Transient("another process has taken over the call")
        _publish_usage(tx, call, attempt)

    async def _seal(self, tx: Tx, outcome: CallOutcome, call: ToolRequest) -> bytes | None:
        """Under the key of the person of the call. None if the person was erased: the outcome is not stored."""
        content = msgspec.json.encode(outcome)
        if not call.subject_id:
            return self._cipher.seal(content, "tool outcome", call.tenant_id, call.key)
        try:
            key = await self._subjects.key(tx, call.tenant_id, call.subject_id)
        except Erased:
            return None
        return key.seal(content.decode(), call.tenant_id, call.subject_id, call.key, "tool outcome")

    async def _open(self, tx: Tx, sealed: bytes | None, subject_id: str, call: ToolRequest) -> CallOutcome:
        try:
            if sealed is None:
                raise Erased
            if not subject_id:
                content = self._cipher.open(sealed, "tool outcome", call.tenant_id, call.key)
                return msgspec.json.decode(content, type=CallOutcome)
            key = await self._subjects.key(tx, call.tenant_id, subject_id)
            return msgspec.json.decode(
                key.open(sealed, call.tenant_id, subject_id, call.key, "tool outcome"), type=CallOutcome
            )
        except Erased:
            return CallOutcome("failed", error="the person of this call was erased")

    @asynccontextmanager
    async def _leased(self, call: ToolRequest, attempt: int) -> AsyncIterator[None]:
        async def renew() -> None:
            while True:
                await asyncio.sleep(self._lease.total_seconds() / 3)
                try:
                    async with self._database.begin(tenant_id=call.tenant_id) as tx:
                        await tx.sql(
                            """
                            UPDATE tool_call SET leased_until = clock_timestamp() + $4
                            WHERE tenant_id = $1 AND key = $2 AND attempt = $3 AND state = 'started'
                            """,
                            call.tenant_id,
                            call.key,
                            attempt,
                            self._lease,
                        )
                except Exception as error:
                    # The next renewal may be in time. If not, another process takes the call over, and `_end` raises.
                    _log.warning(
                        "could not renew the lease of a tool call; will retry",
                        error=type(error).__name__,
                        exc_info=not is_transient(error),
                    )

        task = asyncio.create_task(renew())
        try:
            yield
        finally:
            task.cancel()


async def run_tool(tools: ToolRunner, offer: Offered, call: ToolRequest) -> CallOutcome:
    """Runs the tool until `call.seconds` are over, and retries if a repeat is harmless. Every error is an outcome."""
    effect = offer.tool.effect
    deadline = time.monotonic() + call.seconds
    try:
        async with asyncio.timeout(call.seconds):
            for pause in (*PAUSES, None):
                try:
                    returned = await tools.run(offer, call)
                    result = msgspec.json.encode(returned.value)
                    if len(result) > MAX_RESULT_BYTES:
                        raise TooLarge(f"result: more than {MAX_RESULT_BYTES} bytes")
                    return CallOutcome("succeeded", result.decode(), files=returned.files)
                except Transient as error:
                    if pause is None:
                        raise
                    after = error.after.total_seconds() if isinstance(error, RetryLater) else pause
                    if time.monotonic() + after > deadline:
                        # Otherwise the time would end in the pause, and look as if the tool had not answered.
                        raise
                    await asyncio.sleep(after)
                except Unanswered:
                    if pause is None or effect == "once":
                        raise
                    await asyncio.sleep(pause)
            raise AssertionError("unreachable")
    except EffectFailed as error:
        return CallOutcome("failed", error=error.reason)
    except TooLarge as error:
        return CallOutcome("failed", error=f"too large: {error}")
    except (InvalidMessage, Transient) as error:
        return CallOutcome("failed", error=str(error))
    except Unanswered as error:
        return without_answer(effect, f"no answer: {error}")
    except TimeoutError:
        return without_answer(effect, f"no answer within {call.seconds:.1f} s")
    except Exception as error:
        # Only the position is logged. The message of a library's error may repeat the answer of the tool.
        where = traceback.format_tb(error.__traceback__)[-5:]
        _log.error("tool call failed by an internal error", tool=call.tool, error=type(error).__name__, where=where)
        return without_answer(effect, "internal error of the plugin service")


def _publish_usage(tx: Tx, call: ToolRequest, attempt: int) -> None:
    record = UsageRecorded(
        tenant_id=call.tenant_id,
        usage_id=f"{call.key}/tool/{attempt}",
        resource=f"tool/{call.tool}",
        quantities={"calls": 1},
        occurred_at=utcnow(),
        run_id=call.run_id,
        hold_id=call.hold_id,
        agent_id=UUID(call.agent_id) if call.agent_id else None,
        channel_id=call.channel_id,
        session_key=call.session_key or None,
        api_key_id=call.api_key_id or None,
        member_id=call.member_id,
        tag=call.tag or None,
    )
    tx.publish(USAGE_RECORDS, record, key=call.tenant_id)


def _digest(call: ToolRequest) -> bytes:
    return hashlib.sha256(msgspec.json.encode([call.tool, call.arguments], order="sorted")).digest()
