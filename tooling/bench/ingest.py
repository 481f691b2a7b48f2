"""``ingest``: signed webhooks of 512 B, one in twenty sent twice, are acknowledged after they are stored durably.

Ours is the channel's route with tracing on: signature verified, repeats dropped, message sealed, commits in groups.
Accepted messages are drained to facts and messages in the outbox, in the slice and after it. One anchor is a server
that only answers 200. The other is FastAPI with SQLAlchemy's ORM and a commit per request, which stores one row.
After each of our slices the rows are counted: there must be as many as were acknowledged. The CPU time of a webhook is
counted until all of them are drained.

``ingest-tail``: the time until the acknowledgement at half of our rate, against the empty server at the same rate.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import median

import msgspec

import services.channel
from infra.clock import utcnow, uuid7
from infra.outgoing import webhooks
from infra.postgres.schema import migrate, prepare_database, role_url
from infra.security.crypto import Cipher
from services.channel.accounts.store import AccountSecrets, new_pseudonyms, new_token, token_hash
from tooling.bench import cpu
from tooling.bench.fixture import Fixture
from tooling.bench.http_load import closed_loop, open_loop, request
from tooling.bench.ingest_servers import SECRET
from tooling.bench.protocol import (
    SLICE_SECONDS,
    Anchor,
    Latency,
    Slice,
    Units,
    check,
    latency,
    median_units,
    percentile,
)
from tooling.testing.platform import MASTER_KEY, PASSWORDS
from tooling.testing.stack import free_port

SERVICE = "channel"
TENANTS = 5
CONVERSATIONS = 500
PEOPLE = 300
BODY_BYTES = 512
# Every 20th webhook is a repeat.
REPEATS = 20
# More requests than a storing contender answers in a slice.
REQUESTS = 60_000
TAIL_SECONDS = 4.0
TAIL_ROUNDS = 5


@dataclass
class IngestBench:
    """All contenders. Their servers run inside the block of `running`."""

    fixture: Fixture
    paths: list[str] = field(default_factory=list)
    ports: dict[str, int] = field(default_factory=dict)
    pid: int = 0
    """Of our server."""
    microseconds: dict[str, list[float]] = field(default_factory=lambda: {"server": [], "postgres": []})
    """CPU time of a webhook in each of our slices, until it was drained."""
    drained_ratio: list[float] = field(default_factory=list)
    """The part of the messages that were drained before the slice ended."""

    def anchors(self) -> list[Anchor]:
        return [
            Anchor("empty POST by granian", 0.4, self._empty),
            Anchor("FastAPI and ORM, a commit each", 15, self._orm),
        ]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Makes the service's schema and its channels, and runs the three servers."""
        await prepare_database(self.fixture.admin_url, {SERVICE: PASSWORDS})
        await migrate(self.fixture.admin_url, SERVICE, Path(str(services.channel.__file__)).parent / "migrations")
        await self.fixture.admin.execute(f"SET search_path = {SERVICE}")
        for _ in range(TENANTS):
            await self._connect()
        here = "tooling.bench.ingest_servers"
        urls = {
            "ours": role_url(self.fixture.admin_url, SERVICE, "worker", PASSWORDS.worker),
            "orm": self.fixture.admin_url,
        }
        self.ports = {name: free_port() for name in ("ours", "orm", "empty")}
        commands = {
            name: ["-m", here, name, str(self.ports[name]), url, self.fixture.otlp] for name, url in urls.items()
        }
        commands["empty"] = ["-m", "granian", "--interface", "asginl", "--no-ws", "--loop", "uvloop", "--log-level"]
        commands["empty"] += ["error", "--port", str(self.ports["empty"]), f"{here}:empty"]
        environment = {**os.environ, "CLAW_MASTER_KEY": MASTER_KEY}
        processes = {
            name: await asyncio.create_subprocess_exec(sys.executable, *args, env=environment, start_new_session=True)
            for name, args in commands.items()
        }
        try:
            for name, process in processes.items():
                await _listening(process, self.ports[name])
            self.pid = processes["ours"].pid
            yield
        finally:
            for process in processes.values():
                # SIGKILL to the group: granian has children, and it ignores SIGTERM while it starts.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()

    async def ours(self) -> Slice:
        requests, ids = self._webhooks(REQUESTS)
        before, cpu_before = await self._rows(), self._cpu()
        done, seconds = await closed_loop(self.ports["ours"], requests, SLICE_SECONDS)
        taken = len(set(ids[:done]))
        _, early, _ = await self._rows()
        await self._drained()
        for name, used in cpu.difference(cpu_before, self._cpu()).items():
            self.microseconds[name].append(used * 1e6 / max(done, 1))
        seen, events, messages = (now - then for now, then in zip(await self._rows(), before, strict=True))
        self.drained_ratio.append((early - before[1]) / max(taken, 1))
        check("ingest", {"acknowledged": taken, "seen": seen, "facts": events, "messages": messages // 2})
        return Slice(done, seconds)

    async def tail(self, capacity: float) -> Latency:
        """Latency at half of `capacity`, in turns with the empty server, whose p99 over all turns makes the goal."""
        rate = capacity / 2
        times: dict[str, list[float]] = {"ours": [], "empty": []}
        for _ in range(TAIL_ROUNDS):
            for name, found in times.items():
                requests, _ = self._webhooks(int(rate * TAIL_SECONDS))
                found += await open_loop(self.ports[name], requests, rate)
        goal_ms = 4 * percentile(sorted(times["empty"]), 0.99) * 1000
        return latency(
            "ingest-tail",
            "acknowledged at half load; the goal is 4 × the empty server's p99",
            goal_ms,
            rate,
            times["ours"],
        )

    def cpu_time(self) -> Units:
        """CPU time of a webhook from its acceptance to its messages in the outbox."""
        parts = self.microseconds
        return median_units(
            "ingest",
            "CPU of a webhook, accepted and drained",
            None,
            [sum(both) for both in zip(*parts.values(), strict=True)],
            "µs",
            **{name: median(values) for name, values in parts.items()},
            drained_in_the_slice=median(self.drained_ratio),
        )

    def _cpu(self) -> dict[str, float]:
        pids = {"server": self.pid, "postgres": self.fixture.stack.pid("postgres")}
        return {name: cpu.seconds(pid) for name, pid in pids.items()}

    async def _empty(self) -> Slice:
        # The empty server reads nothing, so the same requests do for all of the slice.
        requests, _ = self._webhooks(1000, "/")
        return Slice(*await closed_loop(self.ports["empty"], cycle(requests), SLICE_SECONDS))

    async def _orm(self) -> Slice:
        requests, _ = self._webhooks(REQUESTS, "/webhooks")
        return Slice(*await closed_loop(self.ports["orm"], requests, SLICE_SECONDS))

    def _webhooks(self, count: int, path: str | None = None) -> tuple[Sequence[bytes], Sequence[str]]:
        """Requests signed at this moment, and their ids."""
        requests: list[bytes] = []
        ids: list[str] = []
        now = utcnow()
        for n in range(count):
            if n % REPEATS == REPEATS - 1:
                requests.append(requests[-1])
                ids.append(ids[-1])
                continue
            id_ = f"msg_{secrets.token_hex(8)}"
            message = {"conversation_id": f"c{n % CONVERSATIONS:03}", "user_id": f"u{n % PEOPLE:03}", "text": ""}
            message["text"] = secrets.token_hex(BODY_BYTES)[: BODY_BYTES - len(msgspec.json.encode(message))]
            body = msgspec.json.encode(message)
            headers = {"content-type": "application/json", **webhooks.sign(SECRET, id_, now, body)}
            requests.append(request(path or self.paths[n % TENANTS], headers, body))
            ids.append(id_)
        return requests, ids

    async def _drained(self) -> None:
        """Returns once no accepted message waits. The drainer of our server works in the slice and after it."""
        while True:
            if not await self.fixture.admin.fetchval("SELECT count(*) FROM accepted"):
                return
            await asyncio.sleep(0.1)

    async def _rows(self) -> tuple[int, int, int]:
        row = await self.fixture.admin.fetchrow(
            "SELECT (SELECT count(*) FROM inbound_seen), (SELECT count(*) FROM event), (SELECT count(*) FROM outbox)"
        )
        return tuple(row)

    async def _connect(self) -> None:
        secrets_ = AccountSecrets(Cipher(MASTER_KEY))
        id_, token = uuid7(), new_token()
        credentials = msgspec.json.encode({"secret": SECRET, "reply_url": "http://127.0.0.1/"})
        await self.fixture.admin.execute(
            """
            INSERT INTO account (id, tenant_id, type, agent_id, token_hash, token, credentials, pseudonyms)
            VALUES ($1, $2, 'webhook', $1, $3, $4, $5, $6)
            """,
            id_,
            str(uuid7()),
            token_hash(token),
            secrets_.seal(id_, "token", token),
            secrets_.seal(id_, "credentials", credentials),
            secrets_.seal(id_, "pseudonyms", new_pseudonyms()),
        )
        self.paths.append(f"/webhooks/webhook/{token}")


async def _listening(process: Process, port: int) -> None:
    async with asyncio.timeout(120):
        while True:
            if process.returncode is not None:
                raise RuntimeError("a server of the bench ended; see its output above")
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            writer.close()
            return
