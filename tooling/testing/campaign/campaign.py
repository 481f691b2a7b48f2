"""One campaign: clients send, faults are injected, everything comes to rest, and the invariants judge."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import msgspec

from infra.errors import describe
from protos.catalog import SERVICES
from tooling.testing.campaign import faults
from tooling.testing.campaign.collect import Collector
from tooling.testing.campaign.evidence import Evidence
from tooling.testing.campaign.faults import Injected, Injector
from tooling.testing.campaign.history import shortest
from tooling.testing.campaign.invariants import Verdict, judge, reply_to
from tooling.testing.campaign.load import CONVERSATIONS, VENDOR_SECONDS, Load
from tooling.testing.campaign.rig import LEASES, ROUTED, TWINS, Rig
from tooling.testing.campaign.wires import Wires
from tooling.testing.model_server import ModelServer
from tooling.testing.stack import Stack
from tooling.testing.system import System
from tooling.testing.until import until

# The campaign gives up if no reply has come for this long after the last fault.
STALL_SECONDS = 120.0
OPEN = ("queued", "running", "waiting", "indeterminate")


class Availability(msgspec.Struct):
    """The first call for each message, faults included. Seconds."""

    calls: int
    in_time: int
    """Acknowledged within the vendor's time limit."""
    median_seconds: float
    slowest_seconds: float
    slowest_reply_seconds: float
    """From the acknowledgement to the visible reply."""


class Shown(msgspec.Struct):
    """A violation with the history of its message."""

    invariant: str
    what: str
    history: list[str]


class Report(msgspec.Struct, kw_only=True):
    """The result of a campaign."""

    seed: int
    faults: list[str]
    instances: int = 1
    """Of each service."""
    planned: int
    seconds: float
    injected: list[Injected]
    accepted: int
    """Messages that were acknowledged."""
    attempts: int
    """Calls of the clients, repeats included."""
    failed_attempts: dict[str, int]
    """HTTP status, or the kind of transport error → number of calls that ended so."""
    forged: int
    replies: int
    unknown: int
    """Deliveries that the vendor may have shown or not."""
    dead_letters: int
    unplanned: dict[str, int] = {}
    """Of the dead letters those that no poison explains: consumer and error → their number."""
    poison: int
    extra_model_calls: int
    """Calls of the model beyond one for each step: their answers were lost."""
    invariants: list[Verdict]
    availability: Availability
    shown: list[Shown]
    """For each invariant that failed, the violation with the shortest history."""

    @property
    def done(self) -> list[Injected]:
        """The faults that were injected."""
        return [fault for fault in self.injected if not fault.missed]

    @property
    def held(self) -> bool:
        return all(verdict.held for verdict in self.invariants)


class Campaign:
    """A campaign on a running system, whose processes are restarted by its supervisor.

    `names`: the kinds of faults, from `faults.FAULTS`. `rig`: for faults that change start scripts; see `rigged`.
    """

    def __init__(
        self,
        system: System,
        models: ModelServer,
        seed: int,
        names: Sequence[str],
        *,
        conversations: int = CONVERSATIONS,
        instances: int = 1,
        rig: Rig | None = None,
        wires: Wires | None = None,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self._system = system
        self._stack = rig.stack if rig else Stack(system.home)
        self._seed = seed
        self._names = list(names)
        self._instances = instances
        self._load = Load(
            system,
            models,
            seed,
            duplicates="duplicates" in names,
            reorder="reorder" in names,
            conversations=conversations,
            wires=wires,
        )
        self._rig = rig
        self._wires = wires
        self._stall_seconds = stall_seconds

    async def run(self, count: int, tell: Callable[[str], None], targets: Sequence[str] = ()) -> Report:
        """Injects `count` faults (only these `targets`, if any are given) under load. `tell` gets a line for each."""
        injector = Injector(self._stack, self._rig, self._wires, self._load.kept_answers, tell)
        since = time.time()
        async with self._load.prepared():
            began = time.time()
            sending = asyncio.create_task(self._load.run())
            planned = faults.plan(self._seed, self._names, count, targets, self._instances)
            injecting = asyncio.create_task(injector.run(planned, began))
            # Clients that have failed must end the campaign, which would otherwise wait for more load.
            await asyncio.wait({sending, injecting}, return_when=asyncio.FIRST_COMPLETED)
            self._load.stopping.set()
            if not injecting.done():
                injecting.cancel()
            # A message that is never acknowledged would be sent again without end.
            await asyncio.wait({sending}, timeout=STALL_SECONDS)
            stuck = sending.cancel()
            ended = await asyncio.gather(sending, injecting, return_exceptions=True)
            problems = [f"the campaign: {describe(error)}" for error in ended if isinstance(error, Exception)]
            if stuck:
                problems.append(f"a message was not acknowledged within {STALL_SECONDS:.0f} s after the last fault")
            tell("no more faults; waiting until everything has come to rest")
            try:
                await until(self._healthy, seconds=STALL_SECONDS)
            except TimeoutError:
                problems.append(f"the system was not ready within {STALL_SECONDS:.0f} s after the last fault")
            await self._at_rest()
            seconds = time.time() - began
            collector = Collector(self._system, self._stack, self._load, injector.poison, since, problems)
            evidence = await collector.evidence()
        return self._report(began, seconds, count, injector.injected, evidence)

    async def _healthy(self) -> bool:
        async with self._system.operator() as operator:
            try:
                answer = await operator.api.get("/api/v1/status")
            except httpx.TransportError:
                return False
        return answer.status_code == 200 and answer.json()["status"] == "ready"

    async def _at_rest(self) -> None:
        """Returns when every message has its end, or after a while without another one."""
        seen, since = -1, time.monotonic()
        while time.monotonic() - since < self._stall_seconds:
            left = await self._open()
            if left == 0:
                return
            if left != seen:
                seen, since = left, time.monotonic()
            await asyncio.sleep(2)

    async def _open(self) -> int:
        """How many messages have no end yet, and how many runs."""
        ended = {reply.text for reply in self._load.replies()}
        count = 0
        for tenant in self._load.tenants.values():
            for status in OPEN:
                count += len(await tenant.company.all("/api/v1/runs", agent_id=tenant.agent, status=status))
            if tenant.vendor:
                # Also unknown ones: they may be shown or not.
                found = await tenant.company.all("/api/v1/messages")
                ended |= {one["text"] for one in found if one["direction"] == "outbound" and one["state"] != "queued"}
        return count + sum(not one.key and reply_to(one.text) not in ended for one in self._load.sent)

    def _report(
        self, began: float, seconds: float, planned: int, injected: list[Injected], evidence: Evidence
    ) -> Report:
        replied = {reply.text: reply.at for reply in reversed(evidence.replies)}
        ends = {one.text: replied[reply_to(one.text)] for one in evidence.sent if reply_to(one.text) in replied}
        for fault in [fault for fault in injected if not fault.missed]:
            after = [ends[one.text] for one in evidence.sent if one.at > began + fault.second and one.text in ends]
            fault.recovered_after = round(min(after) - began - fault.second, 1) if after else None
        verdicts = judge(evidence)
        webhooks = evidence.of_channels()
        times = sorted(one.seconds for one in webhooks) or [0.0]
        steps = [step for run in evidence.runs for step in run.calls_of_model()]
        shown = []
        for verdict in verdicts:
            if found := shortest(evidence, verdict):
                shown.append(Shown(verdict.name, found[0].what, found[1]))
        return Report(
            seed=self._seed,
            faults=self._names,
            instances=self._instances,
            planned=planned,
            seconds=round(seconds, 1),
            injected=injected,
            accepted=len(evidence.sent),
            attempts=self._load.attempts,
            failed_attempts=dict(Counter(self._load.failed)),
            forged=evidence.forged,
            replies=len(evidence.replies),
            unknown=sum(run.deliveries.count("unknown") for run in evidence.runs),
            dead_letters=len(evidence.dead_letters),
            unplanned=evidence.unplanned(),
            poison=len(evidence.poison),
            extra_model_calls=len(evidence.calls) - len(steps),
            invariants=verdicts,
            availability=Availability(
                len(webhooks),
                sum(one.at_once and one.seconds <= VENDOR_SECONDS for one in webhooks),
                round(statistics.median(times), 3),
                round(times[-1], 1),
                round(max((ends[one.text] - one.at for one in webhooks if one.text in ends), default=0.0), 1),
            ),
            shown=shown,
        )


@asynccontextmanager
async def rigged(system: System, names: Sequence[str], instances: int = 1) -> AsyncIterator[tuple[Rig, Wires | None]]:
    """Prepares a system of the campaign's own for these faults. The proxies end with the block.

    `instances`: 1 or 2 of each service, which share their ports.
    """
    rig = Rig(system.home)
    async with AsyncExitStack() as stack:
        wires = Wires(stack) if "network" in names else None
        if wires:
            await rig.route(wires)
        if "stop" in names:
            for service in (*TWINS, "billing"):
                rig.export(service, LEASES)
        if instances > 1:
            rig.add_twins(SERVICES, share_ports=True)
        elif "stop" in names:
            rig.add_twins(TWINS, share_ports=False)
        await rig.restart(sorted({*ROUTED, *TWINS} if wires or "stop" in names else ()))
        yield rig, wires
