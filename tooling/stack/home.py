"""The state folder of a stack: its path, and its ports, passwords and users."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tooling.stack.checkout import CHECKOUT, closed_name, is_closed
from tooling.stack.engines import ENGINES
from tooling.stack.engines.base import EngineError, Place, Secrets, write_atomically

# The state folders of root's stacks whose checkouts are closed to other users.
STATE = Path("/var/lib/clawbus")
# The usual port of each listener of each service.
SERVICE_PORTS = {
    "user": 8001,
    "user_grpc": 9001,
    "agent": 8002,
    "agent_grpc": 9002,
    "channel": 8003,
    "channel_grpc": 9003,
    "memory": 8004,
    "memory_grpc": 9004,
    "billing": 8005,
    "billing_grpc": 9005,
    "plugin": 8006,
    "plugin_grpc": 9006,
    "log_aggregator": 8007,
    "log_aggregator_grpc": 9007,
    "otlp": 4318,
    "notification": 8008,
    "notification_grpc": 9008,
    "ws_gateway": 8081,
    "ws_gateway_grpc": 9081,
}
SERVICES = tuple(name for name in SERVICE_PORTS if not name.endswith(("_grpc", "otlp")))
# Offsets that stacks side by side are known to use; any other must not meet their ports.
_USUAL_OFFSETS = (0, 400, 2000, 5000)


def home_folder() -> Path:
    """CLAW_HOME, or .claw in the checkout; for root in a closed checkout, a folder below /var/lib/clawbus."""
    if named := os.environ.get("CLAW_HOME"):
        return Path(named).absolute()
    return STATE / closed_name() if is_closed() else CHECKOUT / ".claw"


def usual_ports() -> dict[str, int]:
    """Every listener's port without an offset."""
    ports = dict(SERVICE_PORTS)
    for engine in ENGINES.values():
        ports.update(engine.PORTS)
    return ports


def ports_at(offset: int) -> dict[str, int]:
    """Every listener's port at this offset.

    Raises EngineError if some would meet those of a stack at a usual offset, or are no ports.
    """
    usual = usual_ports()
    ports = {name: port + offset for name, port in usual.items()}
    for other in _USUAL_OFFSETS:
        taken = {port + other: name for name, port in usual.items()}
        for name, port in ports.items():
            if other != offset and port in taken:
                raise EngineError(
                    f"CLAW_PORT_OFFSET: {offset} puts {name} on port {port}, where a stack at offset {other} has its "
                    f"{taken[port]}; take 0, 400, 2000 or 5000"
                )
    if not all(1024 <= port <= 65535 for port in ports.values()):
        raise EngineError(f"CLAW_PORT_OFFSET: {offset} leaves the range of ports 1024 to 65535")
    return ports


class Home:
    """A stack's state folder. Files are written whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def place(self) -> Place:
        """The stack's ports and passwords, made and stored if it has none yet.

        CLAW_PORT_OFFSET, where set, wins over what is stored. Raises EngineError for an offset that cannot be.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        stored = self._read("ports.json")
        ports = stored or ports_at(0)
        if text := os.environ.get("CLAW_PORT_OFFSET"):
            if not text.isdecimal():
                raise EngineError(f"CLAW_PORT_OFFSET: {text!r} is not a whole number, 0 or more")
            ports = ports_at(int(text))
        # A stack from before a listener was added gets its port beside the others.
        ports = {**{name: port for name, port in ports_at(0).items() if name not in ports}, **ports}
        if ports != stored:
            write_atomically(self.path / "ports.json", json.dumps(ports, indent=1))
        return Place(self.path, ports, Secrets(self.path / "secrets.json"), SERVICES)

    def write_credentials(self, place: Place, engines: Mapping[str, object]) -> None:
        """Writes credentials.json: administrators' access to these engines and those it has already."""
        known = self._read("credentials.json").get("engines", {})
        credentials = {
            "base_url": f"http://127.0.0.1:{place.ports['nginx']}",
            "admin_token": place.secret("admin_token"),
            "engines": {**known, **engines},
        }
        write_atomically(self.path / "credentials.json", json.dumps(credentials, indent=1))

    def credentials(self) -> dict[str, Any]:
        """What `write_credentials` wrote. Raises EngineError where no stack was ever started."""
        if not (found := self._read("credentials.json")):
            raise EngineError(f"{self.path} has no credentials: no stack was started here. Start it with ./claw up")
        return found

    def write_demo(self, demo: Mapping[str, str]) -> None:
        """Keeps what the demo has made (tenant_id, api_key, agent_id), for `./claw chat`."""
        write_atomically(self.path / "demo.json", json.dumps(demo, indent=1))

    def demo(self) -> dict[str, Any]:
        """What the demo has made last; empty if it never ran."""
        return self._read("demo.json")

    def _read(self, name: str) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise EngineError(
                f"{self.path / name} is damaged ({error}): restore it, or forget the stack with `./claw down --wipe`"
            ) from error
        return content
