"""``./claw compose``: makes the containers' secrets, and prepares database, brokers and gateway in containers."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import secrets
from pathlib import Path

import typer
from rich.console import Console

from infra.connections import TLS_FILES
from infra.postgres.schema import Passwords
from tooling.cli.output import Json, print_json
from tooling.stack.checkout import CHECKOUT
from tooling.stack.engines import nginx, valkey
from tooling.stack.engines.base import EngineError, Place, Secrets, write_atomically
from tooling.stack.engines.certificates import ADMIN, issue
from tooling.stack.engines.certificates import folder as tls_folder
from tooling.stack.home import SERVICE_PORTS, SERVICES
from tooling.stack.keys import make_keys
from tooling.stack.provision import bring_up_to_date

app = typer.Typer(no_args_is_help=True, help="Run the system in containers (compose.yml).")
console = Console(stderr=True, highlight=False)

# Values that a person may change. All other values that compose.yml requires are generated secrets.
_CHOSEN = {
    "CLAW_MAIL_FROM": "clawbus@example.com",
    "CLAW_SMTP_URL": "smtp://mail.example.com:587",
    "GATEWAY_PORT": "8080",
    "MINIO_ROOT_USER": "clawbus",
}
# Part with a certificate → the user of its container, who must be able to read the key.
_TLS_USERS = {
    "nginx": 101,
    "prometheus": 65534,
    "postgres": 999,
    "redis": 999,
    "kafka": 1000,
    "rabbitmq": 999,
    "minio": 0,
    "elasticsearch": 1000,
}
# Of our own image.
_IMAGE_USER = 10001
# One client needs far less than ten a second. A vendor sends the messages of many people, for many channels.
_LIMITS = nginx.Limits(rate=10, burst=40, channel_rate=100, channel_burst=400, webhook_rate=1000, webhook_burst=2000)
_NEEDED = re.compile(r"\$\{([A-Z0-9_]+):\?\}")


@app.command()
def init(as_json: Json = False) -> None:
    """Write `.env` for compose.yml. Adds a new secret for each missing value and changes no other value."""
    path = CHECKOUT / ".env"
    there = path.read_text().splitlines() if path.exists() else []
    known = {line.partition("=")[0] for line in there}
    wanted = set(_NEEDED.findall((CHECKOUT / "compose.yml").read_text()))
    added = sorted(wanted - known)
    write_atomically(path, "".join(f"{line}\n" for line in [*there, *(f"{name}={_new(name)}" for name in added)]))
    console.print(f"{path}: {len(added)} values added. Only you can read the file.", soft_wrap=True)
    console.print("Set CLAW_SMTP_URL and CLAW_MAIL_FROM in it. Then: docker compose up --build -d", soft_wrap=True)
    if as_json:
        print_json({"file": str(path), "added": added})


@app.command()
def provision(as_json: Json = False) -> None:
    """Bring keys, database, brokers and the gateway's configuration up to date, from compose.yml's first container."""
    env = os.environ
    try:
        roles = {
            name: Passwords(*(env[f"{name.upper()}_{role}_PASSWORD"] for role in ("OWNER", "REQUEST", "WORKER")))
            for name in SERVICES
        }
        rabbitmq, kafka, redis = (
            {name: env[f"{name.upper()}_{engine}_PASSWORD"] for name in SERVICES}
            for engine in ("RABBITMQ", "KAFKA", "REDIS")
        )
        urls = {
            "database": env["CLAW_ADMIN_DATABASE_URL"],
            "kafka": env["CLAW_KAFKA_BOOTSTRAP_SERVERS"],
            "rabbit_url": env["CLAW_RABBITMQ_URL"],
            "management_url": env["CLAW_RABBITMQ_MANAGEMENT_URL"],
        }
        gateway = Path(env["CLAW_GATEWAY_CONFIG"])
        redis_accounts, redis_admin = Path(env["CLAW_REDIS_ACCOUNTS"]), env["CLAW_REDIS_PASSWORD"]
        keys = Path(env["CLAW_KEYS_FOLDER"])
    except KeyError as error:
        raise EngineError(f"{error.args[0]}: must be set in the environment") from None
    make_keys(keys, SERVICES, env.get("CLAW_MASTER_KEY", ""))
    asyncio.run(bring_up_to_date(roles, rabbitmq, kafka, **urls))
    # Readable by all, because the gateway and Redis run as other users. The files contain no secret: the passwords
    # behind the hashes are random.
    write_atomically(redis_accounts, valkey.accounts(redis_admin, redis), mode=0o644)
    write_atomically(
        gateway, gateway_configuration(env.get("CLAW_TLS_URL", ""), env.get("CLAW_INSIDE_TLS", "")), mode=0o644
    )
    console.print(f"Database and brokers are up to date, and so is {gateway}.")
    if as_json:
        print_json({"gateway": str(gateway), "services": SERVICES})


@app.command()
def certificates(folder: Path, as_json: Json = False) -> None:
    """Make the certificates of all parts in FOLDER, or renew them, from the first container of compose.tls.yml."""
    place = Place(folder, {}, Secrets(folder / "secrets.json"))
    owners = {ADMIN: _IMAGE_USER, **_TLS_USERS, **dict.fromkeys(SERVICES, _IMAGE_USER)}
    issue(place, list(owners))
    for owner, user in owners.items():
        own = tls_folder(place, owner)
        if owner == "kafka":
            # Kafka reads key and certificate from one file.
            write_atomically(own / "keystore.pem", (own / TLS_FILES[2]).read_text() + (own / TLS_FILES[1]).read_text())
        for file in own.iterdir():
            os.chown(file, user, -1)
    public = tls_folder(place, "public")
    public.mkdir(exist_ok=True)
    write_atomically(public / TLS_FILES[0], (tls_folder(place, ADMIN) / TLS_FILES[0]).read_text(), mode=0o644)
    console.print(f"{folder}: {len(owners)} parts have certificates.", soft_wrap=True)
    if as_json:
        print_json({"folder": str(folder), "parts": list(owners)})


def gateway_configuration(tls_url: str = "", inside: str = "") -> str:
    """The nginx.conf of the containers' gateway. tls_url: its address for clients; empty: it serves no TLS. inside: the
    folder of its certificate for requests to services; empty: they serve no TLS.

    The gateway starts before the services, and services are replaced while it runs. So it asks Docker's name server
    repeatedly for their addresses.
    """
    return nginx.configuration(
        listen="8080",
        folder="/tmp/gateway",
        services={name: f"{name}:{SERVICE_PORTS[name]}" for name in SERVICES},
        limits=_LIMITS,
        resolver="127.0.0.11",
        tls=nginx.Tls("8443", tls_url, "/etc/tls/fullchain.pem", "/etc/tls/privkey.pem") if tls_url else None,
        inside=inside or None,
    )


def _new(name: str) -> str:
    if name == "MINIO_KMS_SECRET_KEY":
        return f"clawbus:{base64.b64encode(secrets.token_bytes(32)).decode()}"
    return _CHOSEN.get(name) or secrets.token_urlsafe(24)
