"""Changes to a system in the campaign's own state folder: failpoints, second instances, proxies, code without a guard.

They are made in the start scripts and the copies of the code in that folder. No service has an option for them.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx

from infra.web.http import PROCESS
from tooling.stack.checkout import CHECKOUT
from tooling.stack.supervisor import Supervisor
from tooling.testing.campaign.wires import Wires
from tooling.testing.packages import extract
from tooling.testing.stack import Stack, free_port

READY_SECONDS = 120.0
# Shorter than in production, so that a stop of STOP_SECONDS outlasts leases and sessions.
LEASES = {"CLAW_LEASE_SECONDS": "4", "CLAW_KAFKA_SESSION_MS": "6000"}
STOP_SECONDS = 8.0
# With the fault `stop` these have a second instance, which takes over while the first one is stopped.
TWINS = ("agent", "channel")
# The second instance has the name of its service with this at the end.
TWIN = "_twin"
# Connections that are opened to reach one of two processes that share a port: all reach the other one once in 4,000.
ASKED = 12
# These services reach PostgreSQL, Kafka and RabbitMQ through proxies, and the agent reaches the called services.
ROUTED = ("channel", "agent", "billing")
CALLED = ("memory", "billing", "plugin")
_SECRETS = {
    "CLAW_DATABASE_URL": "postgres",
    "CLAW_REQUEST_DATABASE_URL": "postgres",
    "CLAW_RABBITMQ_URL": "rabbitmq",
}
_SERVERS = "CLAW_KAFKA_BOOTSTRAP_SERVERS"
_CODE = ("infra", "protos", "services")


class Change(NamedTuple):
    """In this file, the text `old` is replaced by `new`."""

    file: str
    old: str
    new: str

    def apply(self, code: Path) -> None:
        """Changes the file in a copy of the code. Raises ValueError if `old` is not in it exactly once."""
        text = (code / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file}: {self.old!r} is {text.count(self.old)} times in it, must be there once")
        (code / self.file).write_text(text.replace(self.old, self.new))


class Rig:
    """`home`: the state folder of a running system that belongs to the campaign alone."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.stack = Stack(home)
        self._supervisor = Supervisor(home)
        self._ports: Mapping[str, int] = json.loads((home / "ports.json").read_text())
        self._armed = home / "failpoints"
        self.twins: list[str] = []

    def export(self, service: str, variables: Mapping[str, str]) -> None:
        """Sets variables in the start script of the service, for its next start. The values are shell words."""
        script = self._script(service)
        lines = [line for line in script.read_text().splitlines() if not line.startswith(_exports(variables))]
        lines[-1:-1] = [f"export {name}={value}" for name, value in variables.items()]
        script.write_text("\n".join(lines) + "\n")

    async def restart(self, services: Sequence[str]) -> None:
        """Kills the services, and waits until the supervisor has started them again and they are ready."""
        before = {name: self.stack.pid(name) for name in services}
        for name in services:
            self.stack.kill(name)
        for name in services:
            # The second instances have unknown ports, or the ports of the first ones.
            if name in self._ports:
                await self.ready(name, not_pid=before[name])

    async def ready(self, service: str, not_pid: int = 0) -> None:
        """Waits until the service is ready, in another process than `not_pid`. Raises TimeoutError."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if self.stack.pid(service) != not_pid and await self.is_ready(service):
                return
            await asyncio.sleep(0.2)
        raise TimeoutError(f"{service} was not ready within {READY_SECONDS:.0f} s")

    async def is_ready(self, service: str) -> bool:
        """The instance answers that it is ready. `service`: its name, or that of its second instance with its ports."""
        pid = self.stack.pid(service)
        url = f"http://127.0.0.1:{self._ports[service.removesuffix(TWIN)]}/readyz"
        # Each connection goes to one of the processes that share the port.
        for _ in range(ASKED):
            async with httpx.AsyncClient(trust_env=False, timeout=2) as client:
                try:
                    answer = await client.get(url)
                except httpx.TransportError:
                    continue
            if answer.headers.get(PROCESS) == str(pid):
                return answer.status_code == HTTPStatus.OK
        return False

    def add_twins(self, services: Sequence[str], *, share_ports: bool) -> None:
        """Starts second instances, which share the work of the first ones.

        `share_ports`: clients reach them by the ports of the first ones. Otherwise they get no requests.
        """
        folder = self.home / "programs"
        for name in services:
            twin = f"{name}{TWIN}"
            script = (folder / f"{name}.sh").read_text()
            self._write(folder / f"{twin}.sh", script.replace(f"programs/{name}.starts", f"programs/{twin}.starts"))
            section = (folder / f"{name}.conf").read_text()
            for old, new in (
                (f"[program:{name}]", f"[program:{twin}]"),
                (f"{name}.sh", f"{twin}.sh"),
                (f"{name}.log", f"{twin}.log"),
            ):
                section = section.replace(old, new)
            self._write(folder / f"{twin}.conf", section)
            if not share_ports:
                self.export(twin, {"CLAW_HTTP_PORT": "0", "CLAW_GRPC_PORT": "0"})
            self._supervisor.load(twin)
            self.twins.append(twin)

    def set_clock(self, service: str, offset: str) -> None:
        """Lets the service, from its next start on, have a clock that differs so much, such as ``+5m``."""
        if not (self.home / "faketime").exists():
            (self.home / "faketime").mkdir(mode=0o755)
            extract("libfaketime", self.home / "faketime")
            for path in (self.home / "faketime", *(self.home / "faketime").rglob("*")):
                self._own(path)
        [library] = (self.home / "faketime").rglob("libfaketimeMT.so.1")
        # Only the time of the day: the monotonic clock stays right.
        variables = {"LD_PRELOAD": str(library), "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        self.export(service, variables)

    def set_failpoint(self, service: str, point: str, number: signal.Signals) -> None:
        """Lets the service, from its next start on, get the signal at this point once it is armed."""
        self._armed.mkdir(exist_ok=True)
        self._own(self._armed)
        marker = self._armed / f"{service}.armed"
        variables = {"CLAW_FAILPOINT": point, "CLAW_FAILPOINT_ONCE": str(marker), "CLAW_FAILPOINT_SIGNAL": number.name}
        self.export(service, variables)

    async def passed_failpoint(self, service: str, seconds: float) -> bool:
        """Arms the failpoint. False if the service has not passed it within this time; it is then disarmed."""
        armed = self._armed / f"{service}.armed"
        armed.touch()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not armed.exists():
                return True
            await asyncio.sleep(0.05)
        armed.unlink(missing_ok=True)
        return False

    async def route(self, wires: Wires) -> None:
        """Lets the services reach engines and each other through proxies from their next start on. Restarts Kafka."""
        broker = await self._route_kafka(wires)
        for service in ROUTED:
            secrets = self.home / service / "secrets"
            for name, wire in _SECRETS.items():
                (secrets / name).write_text(await wires.lead(wire, (secrets / name).read_text()))
            (secrets / _SERVERS).write_text(broker)
        for called in CALLED:
            address = f"127.0.0.1:{self._ports[f'{called}_grpc']}"
            target = urlsplit(await wires.lead("grpc", f"grpc://{address}")).netloc
            self.export("agent", {f"CLAW_{called.upper()}_GRPC": target})

    async def _route_kafka(self, wires: Wires) -> str:
        """Gives Kafka another listener, and returns its address. Clients go on to the address that a listener names, so
        this one names the proxy's."""
        port = free_port()
        proxied = urlsplit(await wires.lead("kafka", f"kafka://127.0.0.1:{port}")).netloc
        folder = self.home / "kafka"
        text = (folder / "server.properties").read_text()
        for setting, more in (
            ("listeners", f"PROXIED://127.0.0.1:{port}"),
            ("advertised.listeners", f"PROXIED://{proxied}"),
            ("listener.security.protocol.map", "PROXIED:PLAINTEXT"),
        ):
            text = re.sub(rf"^({re.escape(setting)}=.*)$", rf"\1,{more}", text, flags=re.MULTILINE)
        self._write(folder / "proxied.properties", text)
        script = self._script("kafka")
        script.write_text(script.read_text().replace("server.properties", "proxied.properties"))
        self.stack.kill("kafka")
        await asyncio.to_thread(self.stack.wait_ready, "kafka")
        return proxied

    def use_code(self, services: Sequence[str], changes: Sequence[Change]) -> None:
        """Lets these services run, from their next start on, from a copy of the code with these changes. Without
        changes they run from the checkout again."""
        code = CHECKOUT
        if changes:
            code = self.home / "code"
            shutil.rmtree(code, ignore_errors=True)
            code.mkdir(mode=0o755)
            for name in _CODE:
                shutil.copytree(CHECKOUT / name, code / name)
            for change in changes:
                change.apply(code)
            for path in (code, *code.rglob("*")):
                self._own(path)
        for service in services:
            self.export(service, {"PYTHONPATH": str(code)})

    def _script(self, service: str) -> Path:
        return self.home / "programs" / f"{service}.sh"

    def _write(self, path: Path, text: str, mode: int = 0o600) -> None:
        path.write_text(text)
        path.chmod(mode)
        self._own(path)

    def _own(self, path: Path) -> None:
        """Gives the file to the user of the stack, which is not root's."""
        owner = (self.home / "programs").stat()
        os.chown(path, owner.st_uid, owner.st_gid)


def _exports(variables: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"export {name}=" for name in variables)
