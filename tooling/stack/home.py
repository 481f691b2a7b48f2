"""The state folder of a stack: its path, and its ports, passwords and users."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tooling.stack.checkout import CHECKOUT, closed_name, is_closed
from tooling.stack.engines import ENGINES
from tooling.stack.engines.base import EngineError, Place, Secrets, make_folder, write_atomically

# The state folders of root's stacks whose checkouts are closed to other users.
STATE = Path("/var/lib/clawbus")
# This file lies in a state folder as long as a restore into it is not complete.
UNFINISHED = "restore.unfinished"
PORTS = "ports.json"
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
    "payments": 8098,
    "notification": 8008,
    "notification_grpc": 9008,
    "ws_gateway": 8081,
    "ws_gateway_grpc": 9081,
}
SERVICES = tuple(name for name in SERVICE_PORTS if not name.endswith(("_grpc", "otlp", "payments")))
# The offsets that stacks on one machine usually have. No other offset may lead to one of their ports.
_USUAL_OFFSETS = (0, 400, 2000, 5000)


def home_folder() -> Path:
    """CLAW_HOME, or .claw in the checkout; for root in a closed checkout, a folder below /var/lib/clawbus.

    Raises EngineError if CLAW_HOME names something else than a folder, or a place in something else.
    """
    if named := os.environ.get("CLAW_HOME"):
        path = Path(named).absolute()
        # Not `Path.exists`, which raises an error if this user may not look into a folder above.
        there = next(one for one in (path, *path.parents) if os.path.exists(one))
        if not there.is_dir():
            raise EngineError(f"CLAW_HOME: {there} is not a folder")
        return path
    return STATE / closed_name() if is_closed() else CHECKOUT / ".claw"


def usual_ports() -> dict[str, int]:
    """Every listener's port without an offset."""
    ports = dict(SERVICE_PORTS)
    for engine in ENGINES.values():
        ports.update(engine.PORTS)
    return ports


def ports_at(offset: int) -> dict[str, int]:
    """Every listener's port at this offset.

    Raises EngineError if a stack at a usual offset has one of these ports, or if one is outside 1024 to 65535.
    """
    usual = usual_ports()
    ports = {name: port + offset for name, port in usual.items()}
    for other in _USUAL_OFFSETS:
        taken = {port + other: name for name, port in usual.items()}
        for name, port in ports.items():
            if other != offset and port in taken:
                raise EngineError(
                    f"CLAW_PORT_OFFSET: {offset} gives {name} the port {port}, which {taken[port]} has in a stack at "
                    f"offset {other}: must be 0, 400, 2000 or 5000"
                )
    if not all(1024 <= port <= 65535 for port in ports.values()):
        raise EngineError(
            f"CLAW_PORT_OFFSET: {offset} leads to ports outside 1024 to 65535: must be 0, 400, 2000 or 5000"
        )
    return ports


class Home:
    """The state folder of a stack. Each file is written whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def place(self) -> Place:
        """The stack's ports and passwords. Makes and stores those that are missing.

        CLAW_PORT_OFFSET has precedence over the stored ports. Raises EngineError for an offset that is not usable.
        """
        make_folder(self.path, "CLAW_HOME")
        stored = self._read(PORTS)
        ports = stored or ports_at(0)
        if text := os.environ.get("CLAW_PORT_OFFSET"):
            if not text.isdecimal():
                raise EngineError(f"CLAW_PORT_OFFSET: {text!r} is not a whole number from 0")
            ports = ports_at(int(text))
        # The stored ports of an older stack lack the listeners that were added since.
        ports = {**{name: port for name, port in ports_at(0).items() if name not in ports}, **ports}
        if ports != stored:
            write_atomically(self.path / PORTS, json.dumps(ports, indent=1))
        return Place(self.path, ports, Secrets(self.path / "secrets.json"), SERVICES)

    def write_credentials(self, place: Place, engines: Mapping[str, object]) -> None:
        """Writes credentials.json: the administrator's access to these engines. Keeps the access to other engines."""
        known = self._read("credentials.json").get("engines", {})
        credentials = {
            "base_url": f"http://127.0.0.1:{place.ports['nginx']}",
            "admin_token": place.secret("admin_token"),
            "engines": {**known, **engines},
        }
        write_atomically(self.path / "credentials.json", json.dumps(credentials, indent=1))

    def credentials(self) -> dict[str, Any]:
        """The content of credentials.json. Raises EngineError if no stack was ever started here."""
        if not (found := self._read("credentials.json")):
            raise EngineError(f"{self.path}: no stack was started here. Start one with ./claw up")
        return found

    def write_demo(self, demo: Mapping[str, str]) -> None:
        """Keeps the demo's tenant_id, api_key and agent_id for `./claw chat`."""
        write_atomically(self.path / "demo.json", json.dumps(demo, indent=1))

    def demo(self) -> dict[str, Any]:
        """The tenant_id, api_key and agent_id of the last demo; empty if no demo ran."""
        return self._read("demo.json")

    def _read(self, name: str) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise EngineError(
                f"{self.path / name} is damaged ({error}): restore the file, or delete the stack with all its data: "
                "./claw down --wipe"
            ) from error
        return content
