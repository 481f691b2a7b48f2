"""RabbitMQ from Debian's package, as a private node that listens on loopback only."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tooling.stack.engines.base import EngineError, Place, Program, write_atomically

NAME = "rabbitmq"
PORTS = {
    "rabbitmq": 5672,
    "rabbitmq_management": 15672,
    "rabbitmq_distribution": 25672,
    "rabbitmq_prometheus": 15692,
    "rabbitmq_epmd": 24369,
}
VHOST = "/"


def install() -> None:
    if not _server().exists():
        raise EngineError(
            "RabbitMQ is not installed and may not be installed by this user: run "
            "`apt-get install --no-install-recommends rabbitmq-server` as root, or your system's own command"
        )


def prepare(place: Place) -> None:
    folder = place.folder(NAME)
    (folder / "home").mkdir(exist_ok=True)
    write_atomically(folder / "enabled_plugins", "[rabbitmq_management,rabbitmq_prometheus].\n")
    settings = {
        "listeners.tcp.1": f"127.0.0.1:{place.ports['rabbitmq']}",
        "management.tcp.ip": "127.0.0.1",
        "management.tcp.port": str(place.ports["rabbitmq_management"]),
        "prometheus.tcp.ip": "127.0.0.1",
        "prometheus.tcp.port": str(place.ports["rabbitmq_prometheus"]),
        "definitions.import_backend": "local_filesystem",
        "definitions.local.path": str(folder / "definitions.json"),
        # Otherwise each start would take back what the provisioning has changed since.
        "definitions.skip_if_unchanged": "true",
        "log.console": "true",
        "log.console.level": "warning",
        "log.console.use_colors": "off",
        "log.file": "false",
        "disk_free_limit.absolute": "200MB",
        "vm_memory_high_watermark.absolute": "1GB",
    }
    write_atomically(folder / "rabbitmq.conf", "".join(f"{name} = {value}\n" for name, value in settings.items()))
    write_atomically(folder / "definitions.json", json.dumps(_definitions(place), indent=1))


def program(place: Place) -> Program:
    folder = place.folder(NAME)
    environment = {
        "HOME": str(folder / "home"),
        "RABBITMQ_NODENAME": "claw@localhost",
        "RABBITMQ_DIST_PORT": str(place.ports["rabbitmq_distribution"]),
        "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        # The second: its schedulers sleep at once instead of spinning, others need the cores.
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +sbwt none",
        # The server in the foreground, without the shell around it that would have to pass signals on.
        "RUNNING_UNDER_SYSTEMD": "true",
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(place.ports["rabbitmq_epmd"]),
    }
    return Program((str(_server()),), environment)


async def ready(place: Place) -> str:
    """A message goes in and comes out again."""
    import aiormq

    connection = await aiormq.connect(access(place)["url"])
    try:
        channel = await connection.channel()
        queue = (await channel.queue_declare(exclusive=True)).queue or ""
        await channel.basic_publish(b"ready", routing_key=queue, mandatory=True)
        message = await channel.basic_get(queue, no_ack=True)
        if message.body != b"ready":
            raise ConnectionError("rabbitmq does not give back what was published")
        return str(connection.server_properties["version"])
    finally:
        await connection.close()


def access(place: Place) -> dict[str, Any]:
    login = f"admin:{place.secret('rabbitmq.admin')}@127.0.0.1"
    return {
        "url": f"amqp://{login}:{place.ports['rabbitmq']}/{quote(VHOST, safe='')}",
        "management_url": f"http://{login}:{place.ports['rabbitmq_management']}",
    }


def _server() -> Path:
    # Not what is in the PATH: Debian's wrapper there wants to be root or the user rabbitmq.
    for path in ("/usr/lib/rabbitmq/bin/rabbitmq-server", shutil.which("rabbitmq-server") or ""):
        if path and Path(path).exists():
            return Path(path)
    return Path("/usr/lib/rabbitmq/bin/rabbitmq-server")


def _definitions(place: Place) -> dict[str, Any]:
    """The virtual host, the administrator, and a user per service with no permission until it is given some."""
    accounts = [("admin", "administrator"), *((user, "") for user in place.users)]
    return {
        "vhosts": [{"name": VHOST}],
        "users": [
            {
                "name": user,
                "password_hash": _hash(place.secret(f"rabbitmq.{user}"), user),
                "hashing_algorithm": "rabbit_password_hashing_sha256",
                "tags": tags,
            }
            for user, tags in accounts
        ],
        "permissions": [
            {"user": "admin", "vhost": VHOST, "configure": ".*", "write": ".*", "read": ".*"},
        ],
    }


def _hash(password: str, user: str) -> str:
    """RabbitMQ's salted SHA-256 (its page "Credentials and Passwords"). The salt is fixed by the user's name, so
    that the same passwords make the same file, which the server then skips."""
    salt = hashlib.sha256(user.encode()).digest()[:4]
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()
