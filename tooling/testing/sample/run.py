"""Runs the processes of the sample on given engines, for crash tests and benches."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from infra.postgres.schema import Passwords, migrate, prepare_database, role_url
from protos.catalog import AUDIT_LOGS, SERVICE_LOGS
from protos.topology import Catalog
from tooling.stack.provision import provision_brokers
from tooling.testing import keys
from tooling.testing.processes import Process
from tooling.testing.sample.catalog import SAMPLE
from tooling.testing.stack import free_port

SERVICES = ("front", "desk", "ledger")
READY_SECONDS = 60.0


@dataclass(frozen=True)
class Engines:
    """Administrators' URLs. `postgres` includes the database and `rabbitmq` the virtual host of the sample."""

    postgres: str
    kafka: str
    rabbitmq: str
    rabbitmq_management: str
    redis: str


class SampleServices:
    """The engines' preparation and the three processes. Their logs go to `folder`."""

    def __init__(
        self, engines: Engines, folder: Path, passwords: Passwords, *, prefix: str = "", otlp: str | None = None
    ) -> None:
        self.engines = engines
        self.prefix = prefix
        self.processes: dict[str, Process] = {}
        self.ports: dict[str, int] = {}
        self._folder = folder
        self._passwords = passwords
        self._environment = {
            **os.environ,
            "CLAW_KAFKA_BOOTSTRAP_SERVERS": engines.kafka,
            "CLAW_TOPIC_PREFIX": prefix,
            "CLAW_RABBITMQ_URL": engines.rabbitmq,
            "CLAW_REDIS_URL": engines.redis,
            "CLAW_KAFKA_SESSION_MS": "6000",
            "CLAW_LEASE_SECONDS": "3",
            "CLAW_FRONT_GRPC": f"127.0.0.1:{free_port()}",
            **({"OTEL_EXPORTER_OTLP_ENDPOINT": otlp} if otlp else {}),
        }

    async def prepare(self) -> None:
        """Roles, schemas, tables, topics and queues."""
        await prepare_database(self.engines.postgres, {f"sample_{name}": self._passwords for name in SERVICES})
        folder = Path(__file__).parent / "ledger" / "migrations"
        await migrate(self.engines.postgres, "sample_ledger", folder)
        await self.provision()

    async def provision(self) -> None:
        """Makes topics and queues. If they were missing, outbox rows that they have lost are published again."""
        await provision_brokers(
            Catalog(topics=(*SAMPLE.topics, AUDIT_LOGS, SERVICE_LOGS), queues=SAMPLE.queues),
            self.engines.postgres,
            kafka=self.engines.kafka,
            rabbit_url=self.engines.rabbitmq,
            management_url=self.engines.rabbitmq_management,
            prefix=self.prefix,
        )

    def url(self, service: str, role: str = "worker") -> str:
        """The database URL of a service for one of its roles."""
        return role_url(self.engines.postgres, f"sample_{service}", role, getattr(self._passwords, role))

    def start(self, instance: str, **environment: str) -> None:
        """Starts a process of a service with additional variables. `instance`: such as ``desk`` or ``desk-2``."""
        name = instance.partition("-")[0]
        grpc = self._environment["CLAW_FRONT_GRPC"].rpartition(":")[2] if name == "front" else ""
        self.ports.setdefault(instance, free_port())
        environment = {
            **self._environment,
            **keys.environment(f"sample_{name}"),
            "CLAW_DATABASE_URL": self.url(name),
            "CLAW_REQUEST_DATABASE_URL": self.url(name, "request"),
            "CLAW_HTTP_PORT": str(self.ports[instance]),
            "CLAW_GRPC_PORT": grpc,
            **environment,
        }
        log = self._folder / f"{instance}.log"
        self.processes[instance] = Process(f"tooling.testing.sample.{name}", environment, log)

    async def ready(self, name: str) -> dict[str, Any]:
        """Waits until the service is ready and returns its answer. Raises RuntimeError with the end of its log."""
        deadline = time.monotonic() + READY_SECONDS
        answer = ""
        async with httpx.AsyncClient(base_url=self.base_url(name)) as client:
            while time.monotonic() < deadline and self.processes[name].poll() is None:
                try:
                    response = await client.get("/readyz")
                    answer = response.text
                    if response.status_code == 200:
                        result: dict[str, Any] = response.json()
                        return result
                except httpx.HTTPError as error:
                    answer = str(error)
                await asyncio.sleep(0.1)
        raise RuntimeError(f"{name} did not become ready ({answer}); {self.last_words(name)}")

    def last_words(self, name: str) -> str:
        """The exit code of the process (None while it runs) and the end of its log."""
        log = (self._folder / f"{name}.log").read_text(errors="replace")[-3000:]
        return f"{name}: exit code {self.processes[name].poll()}; its log ends with\n{log}"

    async def start_all(self) -> None:
        for name in SERVICES:
            self.start(name)
        for name in SERVICES:
            await self.ready(name)

    def base_url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    def wait(self, name: str, seconds: float = 30) -> int:
        """Waits for the end of the process and returns the exit code, negative for a signal."""
        return self.processes[name].wait(seconds)

    def stop(self) -> None:
        """Ends all processes: SIGTERM first, then SIGKILL."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
