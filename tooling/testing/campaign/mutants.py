"""Mutants: the system without one of its guards. A campaign that does not notice has shown nothing about the guard.

The code is changed in a copy in the campaign's own state folder, and SQL in its own database. So no service has an
option that removes a guard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from tooling.testing.campaign.campaign import Campaign
from tooling.testing.campaign.faults import connected
from tooling.testing.campaign.rig import TWIN, Change, Rig
from tooling.testing.model_server import ModelServer
from tooling.testing.system import System

# A lost message has no end, so a mutant's campaign waits less for it. It also has fewer messages to judge.
STALL_SECONDS = 30.0
CONVERSATIONS = 4


class Mutant(NamedTuple):
    """`restore` undoes `statements`. `faults`, `times` and `targets`: the campaign that should notice."""

    guard: str
    removed: str
    services: tuple[str, ...]
    faults: tuple[str, ...]
    times: int
    targets: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    statements: tuple[str, ...] = ()
    restore: tuple[str, ...] = ()


class Result(msgspec.Struct):
    """`found_by`: the invariants that failed. `first`: the first violation."""

    guard: str
    removed: str
    seed: int
    found_by: list[str]
    first: str
    accepted: int
    seconds: float


def _everywhere(function: str, old: str, new: str, schemas: Sequence[str]) -> tuple[str, ...]:
    """Statements that replace `old` by `new` in a function of these schemas."""
    return tuple(
        f"""
        DO $do$
        DECLARE definition text := pg_get_functiondef(
            (SELECT oid FROM pg_proc WHERE proname = '{function}' AND pronamespace = '{schema}'::regnamespace));
        BEGIN
            IF position('{old}' IN definition) = 0 THEN RAISE 'the mutant does not fit {schema}.{function}'; END IF;
            EXECUTE replace(definition, '{old}', '{new}');
        END $do$
        """
        for schema in schemas
    )


_KEPT = "locked.epoch IS NOT DISTINCT FROM g.epoch"
_GONE = "locked.epoch IS NOT DISTINCT FROM locked.epoch"
_FENCES = ("lane_finish", "l.epoch = _epoch", "l.epoch = l.epoch", ("agent", "channel"))
_LANES = "infra/lanes"
MUTANTS = (
    Mutant(
        "dedupe key",
        "each repeat of a webhook gets another dedupe key",
        ("channel",),
        ("kill", "duplicates"),
        6,
        changes=(
            Change(
                "services/channel/domain.py",
                "hashlib.sha256(channel_id.bytes + vendor_id.encode())",
                'hashlib.sha256(channel_id.bytes + __import__("os").urandom(8) + vendor_id.encode())',
            ),
        ),
    ),
    Mutant(
        "epoch fence",
        "a worker that has lost its lane goes on writing, in Python and in SQL",
        ("agent", "channel"),
        ("stop",),
        3,
        ("agent after_lane_claim",),
        changes=(
            Change(f"{_LANES}/claims.py", "if time.monotonic() > self.until:", "if self.until < 0:"),
            Change(
                f"{_LANES}/claims.py",
                "WHERE lane_id = $1 AND epoch = $2 FOR UPDATE",
                "WHERE lane_id = $1 AND $2::bigint IS NOT NULL FOR UPDATE",
            ),
            Change(
                f"{_LANES}/effects.py", "lane_id = $4 AND epoch = $5\n", "lane_id = $4 AND $5::bigint IS NOT NULL\n"
            ),
            Change(
                f"{_LANES}/effects.py", "lane_id = $6 AND epoch = $7 FOR", "lane_id = $6 AND $7::bigint IS NOT NULL FOR"
            ),
            Change(f"{_LANES}/runner.py", "            for lease in lost:\n", "            for lease in lost[:0]:\n"),
        ),
        statements=(*_everywhere("write_runs", _KEPT, _GONE, ["agent"]), *_everywhere(*_FENCES)),
        restore=(
            *_everywhere("write_runs", _GONE, _KEPT, ["agent"]),
            *_everywhere(_FENCES[0], _FENCES[2], _FENCES[1], _FENCES[3]),
        ),
    ),
    Mutant(
        "outbox",
        "the relay marks messages as published before it publishes them",
        ("channel", "agent"),
        ("failpoints",),
        4,
        ("channel after_publish_before_mark", "agent after_publish_before_mark"),
        changes=(
            Change(
                "infra/bus/outbox.py",
                "            outcomes = await self._publisher.publish(pending)\n"
                '        failpoint("after_publish_before_mark")\n'
                "        await self._mark(pending, outcomes)\n",
                "            await self._mark(pending, [None] * len(pending))\n"
                '            failpoint("after_publish_before_mark")\n'
                "            await self._publisher.publish(pending)\n",
            ),
        ),
    ),
    Mutant(
        "signature",
        "any signature of a Standard Webhook fits",
        ("channel",),
        ("kill",),
        6,
        changes=(Change("infra/outgoing/webhooks.py", "if True not in fits:", "if not fits:"),),
    ),
    Mutant(
        "tenant filter",
        "a run is found without its tenant, and row-level security of runs is off",
        ("agent",),
        ("kill",),
        4,
        changes=(
            Change(
                "services/agent/runs/queries.py",
                "WHERE id = $1 AND tenant_id = $2",
                "WHERE id = $1 AND $2::text IS NOT NULL",
            ),
        ),
        statements=("ALTER TABLE agent.run DISABLE ROW LEVEL SECURITY",),
        restore=("ALTER TABLE agent.run ENABLE ROW LEVEL SECURITY",),
    ),
    Mutant(
        "hold",
        "each call of the model is granted, with or without credit",
        ("billing",),
        ("kill",),
        10,
        ("plugin",),
        changes=(
            Change(
                "services/billing/credit/holds.py",
                "granted = available is None or (available > 0 and available >= amount)",
                "granted = True",
            ),
        ),
    ),
)


CONTROL = Mutant("none", "nothing: the control", (), ("kill", "stop", "failpoints", "duplicates"), 5)
"""With all guards, the same campaigns must hold."""


async def try_one(
    system: System, models: ModelServer, rig: Rig, seed: int, mutant: Mutant, tell: Callable[[str], None]
) -> Result:
    tell(f"without {mutant.guard}: {mutant.removed}")
    services = [*mutant.services, *(twin for twin in rig.twins if twin.removesuffix(TWIN) in mutant.services)]
    await _execute(rig, mutant.statements)
    rig.use_code(services, mutant.changes)
    try:
        await rig.restart(services)
        campaign = Campaign(
            system, models, seed, mutant.faults, rig=rig, stall_seconds=STALL_SECONDS, conversations=CONVERSATIONS
        )
        report = await campaign.run(mutant.times, tell, mutant.targets)
    finally:
        await _execute(rig, mutant.restore)
        rig.use_code(services, ())
        await rig.restart(services)
    failed = [verdict for verdict in report.invariants if not verdict.held]
    first = next((violation for verdict in failed for violation in verdict.violations), None)
    return Result(
        mutant.guard,
        mutant.removed,
        seed,
        [verdict.name for verdict in failed],
        first.what if first else "",
        report.accepted,
        report.seconds,
    )


async def _execute(rig: Rig, statements: Sequence[str]) -> None:
    if not statements:
        return
    connection = await connected(rig.stack.postgres_url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()
