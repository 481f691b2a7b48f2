"""RabbitMQ: Debian's package, as a node of this stack only, on loopback only."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

from infra.connections import TLS_FILES
from tooling.stack.engines import certificates
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
            "RabbitMQ is not installed, and this user may not install it. Run as root: "
            "apt-get install --no-install-recommends rabbitmq-server (on Debian or Ubuntu)"
        )


def prepare(place: Place) -> None:
    folder = place.folder(NAME)
    (folder / "home").mkdir(exist_ok=True)
    cookie = folder / "home" / ".erlang.cookie"
    # Erlang would make it, and does not sync it: after a power cut it is empty, and the server never starts again.
    if not cookie.exists() or not cookie.stat().st_size:
        write_atomically(cookie, place.secret("rabbitmq.cookie"), 0o400)
    write_atomically(folder / "enabled_plugins", "[rabbitmq_management,rabbitmq_prometheus].\n")
    settings = {
        **_listener(place),
        "management.tcp.ip": "127.0.0.1",
        "management.tcp.port": str(place.ports["rabbitmq_management"]),
        "prometheus.tcp.ip": "127.0.0.1",
        "prometheus.tcp.port": str(place.ports["rabbitmq_prometheus"]),
        "definitions.import_backend": "local_filesystem",
        "definitions.local.path": str(folder / "definitions.json"),
        # Otherwise each start would undo the changes that the provisioning has made since.
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
        # +sbwt none: an idle scheduler sleeps at once, instead of spinning on a core that other processes need.
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +sbwt none",
        # Makes the script replace itself by the server, which then gets the supervisor's signals directly.
        "RUNNING_UNDER_SYSTEMD": "true",
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(place.ports["rabbitmq_epmd"]),
    }
    return Program((str(_server()),), environment)


async def ready(place: Place) -> str:
    """Publishes a message to a queue of its own and reads it back."""
    import aiormq

    connection = await aiormq.connect(access(place)["url"])
    try:
        channel = await connection.channel()
        queue = (await channel.queue_declare(exclusive=True)).queue or ""
        await channel.basic_publish(b"ready", routing_key=queue, mandatory=True)
        message = await channel.basic_get(queue, no_ack=True)
        if message.body != b"ready":
            raise ConnectionError("rabbitmq did not return the published message")
        return str(connection.server_properties["version"])
    finally:
        await connection.close()


def access(place: Place) -> dict[str, Any]:
    login = f"admin:{place.secret('rabbitmq.admin')}@127.0.0.1"
    query = certificates.query(place, NAME, certificates.ADMIN)
    scheme = "amqps" if query else "amqp"
    return {
        "url": f"{scheme}://{login}:{place.ports['rabbitmq']}/{quote(VHOST, safe='')}{query}",
        "management_url": f"http://{login}:{place.ports['rabbitmq_management']}",
    }


def _listener(place: Place) -> dict[str, str]:
    address = f"127.0.0.1:{place.ports['rabbitmq']}"
    if not certificates.in_use(place):
        return {"listeners.tcp.1": address}
    authority, certificate, key = (str(certificates.folder(place, NAME) / name) for name in TLS_FILES)
    return {
        "listeners.tcp": "none",
        "listeners.ssl.1": address,
        "ssl_options.cacertfile": authority,
        "ssl_options.certfile": certificate,
        "ssl_options.keyfile": key,
        "ssl_options.verify": "verify_peer",
        "ssl_options.fail_if_no_peer_cert": "true",
        "ssl_options.versions.1": "tlsv1.3",
        "ssl_options.versions.2": "tlsv1.2",
    }


def _server() -> Path:
    # Debian's wrapper, which is in the PATH, runs as root or as the user rabbitmq only.
    for path in ("/usr/lib/rabbitmq/bin/rabbitmq-server", shutil.which("rabbitmq-server") or ""):
        if path and Path(path).exists():
            return Path(path)
    return Path("/usr/lib/rabbitmq/bin/rabbitmq-server")


def _definitions(place: Place) -> dict[str, Any]:
    """The virtual host, the administrator, and one user for each service. The provisioning adds the permissions."""
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
    """RabbitMQ's salted SHA-256 (its page "Credentials and Passwords").

    The salt depends on the user's name only: equal passwords make an equal file, which the server then skips.
    """
    salt = hashlib.sha256(user.encode()).digest()[:4]
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()
