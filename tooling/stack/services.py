"""The services as parts of the local stack: their commands, environments and health checks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from infra.connections import context_of
from tooling.stack.checkout import CHECKOUT
from tooling.stack.engines import ENGINES, certificates
from tooling.stack.engines.base import ANSWER_SECONDS, Engine, Place, Program, write_atomically
from tooling.stack.home import SERVICE_PORTS, SERVICES
from tooling.stack.keys import make_keys, master_file, private_file, public_file
from tooling.stack.supervisor import MARK

# The variables that a service reads from files: other programs can see the environment of a process.
SECRETS = frozenset(
    f"CLAW_{name}"
    for name in (
        "DATABASE_URL",
        "REQUEST_DATABASE_URL",
        "KAFKA_BOOTSTRAP_SERVERS",
        "RABBITMQ_URL",
        "REDIS_URL",
        "ADMIN_TOKEN",
        "S3_SECRET_KEY",
        "MILVUS_URL",
        "OPENSEARCH_URL",
        "SMTP_URL",
        "STRIPE_API_KEY",
        "STRIPE_WEBHOOK_SECRET",
    )
)

# In the state folder.
KEYS_FOLDER = "keys"


class LocalService:
    """A service behind the same protocol as an engine."""

    def __init__(self, name: str) -> None:
        self.NAME = name
        self.PORTS = {key: SERVICE_PORTS[key] for key in (name, f"{name}_grpc") if key in SERVICE_PORTS}

    def install(self) -> None:
        """Does nothing: the code is in the checkout."""

    def prepare(self, place: Place) -> None:
        make_keys(keys_folder(place), SERVICES, place.secret.known("master_key"))
        folder = self._secrets_folder(place)
        folder.mkdir(mode=0o700, exist_ok=True)
        for name, value in self._variables(place).items():
            if name in SECRETS:
                write_atomically(folder / name, value)

    def program(self, place: Place) -> Program:
        environment = {name: value for name, value in self._variables(place).items() if name not in SECRETS}
        environment["CLAW_SECRETS_FOLDER"] = str(self._secrets_folder(place))
        # The option has no effect but to name the stack: see `supervisor.orphans`.
        mark = f"{MARK}={place.home}"
        return Program((sys.executable, "-X", mark, "-m", f"services.{self.NAME}"), environment)

    def _secrets_folder(self, place: Place) -> Path:
        return place.folder(self.NAME) / "secrets"

    def _variables(self, place: Place) -> dict[str, str]:
        """All settings of the service by the names of their variables."""
        login = passwords(place, self.NAME)
        accounts = {
            "worker": ("postgres", f"{self.NAME}_worker", login["worker"]),
            "request": ("postgres", f"{self.NAME}_request", login["request"]),
            "rabbitmq": ("rabbitmq", self.NAME, place.secret(f"rabbitmq.{self.NAME}")),
            "redis": ("valkey", self.NAME, place.secret(f"valkey.{self.NAME}")),
        }
        url = {
            name: _login(ENGINES[engine].access(place)["url"], *who, query=certificates.query(place, engine, self.NAME))
            for name, (engine, *who) in accounts.items()
        }
        environment = {
            "PYTHONPATH": str(CHECKOUT),
            "CLAW_DATABASE_URL": url["worker"],
            "CLAW_REQUEST_DATABASE_URL": url["request"],
            "CLAW_KAFKA_BOOTSTRAP_SERVERS": self._brokers(place),
            "CLAW_RABBITMQ_URL": url["rabbitmq"],
            "CLAW_REDIS_URL": url["redis"],
            "CLAW_HTTP_PORT": str(place.ports[self.NAME]),
            # For `./claw rolling-restart`. `./claw up` has checked that no other program uses the ports.
            "CLAW_SHARE_PORTS": "1",
            "CLAW_PRIVATE_KEY_FILE": str(private_file(keys_folder(place), self.NAME)),
            "CLAW_PUBLIC_KEYS_FILE": str(public_file(keys_folder(place))),
            "CLAW_ALLOW_PRIVATE_TARGETS": "1",
            "CLAW_MASTER_KEY_FILE": str(master_file(keys_folder(place), self.NAME)),
            **addresses(place, self.NAME),
        }
        if certificates.in_use(place):
            environment["CLAW_TLS_FOLDER"] = str(certificates.folder(place, self.NAME))
        if self.NAME == "billing":
            # The stand-in that `./claw demo --billing` serves there.
            environment["CLAW_STRIPE_API_BASE"] = f"http://127.0.0.1:{place.ports['payments']}"
            environment["CLAW_STRIPE_API_KEY"] = place.secret("stripe_key")
            environment["CLAW_STRIPE_WEBHOOK_SECRET"] = place.secret("stripe_webhook")
        if self.NAME == "user":
            environment["CLAW_ADMIN_TOKEN"] = place.secret("admin_token")
        if f"{self.NAME}_grpc" in self.PORTS:
            environment["CLAW_GRPC_PORT"] = str(place.ports[f"{self.NAME}_grpc"])
        return environment

    def _brokers(self, place: Place) -> str:
        servers = str(ENGINES["kafka"].access(place)["bootstrap_servers"])
        query = certificates.query(place, "kafka", self.NAME)
        return _login(servers, self.NAME, place.secret(f"kafka.{self.NAME}"), query=query) if query else servers

    async def ready(self, place: Place) -> str:
        version, _ = await self.ready_process(place)
        return version

    async def ready_process(self, place: Place) -> tuple[str, int]:
        """The version and the id of a process of the service that is ready. Raises if the process is not ready.

        If several processes share the port, any of them answers.
        """
        from infra.web.clients import service_client
        from infra.web.http import PROCESS

        own = certificates.folder(place, certificates.ADMIN)
        tls = context_of(own) if certificates.in_use(place) else None
        async with service_client(self.NAME, self.access(place)["url"], tls, ANSWER_SECONDS) as client:
            answer = (await client.get("/readyz")).raise_for_status()
        return str(answer.json()["version"]), int(answer.headers[PROCESS])

    def access(self, place: Place) -> dict[str, Any]:
        return {"url": f"{scheme(place)}://127.0.0.1:{place.ports[self.NAME]}"}


def keys_folder(place: Place) -> Path:
    """The folder of the services' key pairs."""
    return place.home / KEYS_FOLDER


def parts() -> dict[str, Engine]:
    """Every engine, then every service that exists, by name."""
    present = [name for name in SERVICES if (CHECKOUT / "services" / name / "__main__.py").exists()]
    return {**ENGINES, **{name: LocalService(name) for name in present}}


def addresses(place: Place, service: str) -> dict[str, str]:
    """The addresses of all services and stores, for this service. It reads those that its settings name."""
    local = "127.0.0.1"
    grpc = {name: f"{local}:{place.ports[f'{name}_grpc']}" for name in SERVICES if f"{name}_grpc" in place.ports}
    s3 = ENGINES["s3"].access(place)
    return {
        **{f"CLAW_{name.upper()}_GRPC": target for name, target in grpc.items()},
        "CLAW_OPERATIONS": ",".join(f"{name}={target}" for name, target in grpc.items()),
        "CLAW_AGENT_URL": f"{scheme(place)}://{local}:{place.ports['agent']}",
        "CLAW_PUBLIC_URL": ENGINES["nginx"].access(place)["url"],
        "CLAW_MILVUS_URL": certificates.store_url(place, "milvus", service),
        "CLAW_S3_ENDPOINT": certificates.store_url(place, "s3", service),
        "CLAW_S3_ACCESS_KEY": s3["access_key"],
        "CLAW_S3_SECRET_KEY": s3["secret_key"],
        "CLAW_OPENSEARCH_URL": certificates.store_url(place, "opensearch", service),
        "CLAW_SMTP_URL": f"smtp://{local}:{place.ports['mailbox']}",
        "CLAW_OTLP_PORT": str(place.ports["otlp"]),
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{local}:{place.ports['otlp']}",
    }


def scheme(place: Place) -> str:
    """Of the services' HTTP."""
    return "https" if certificates.in_use(place) else "http"


def passwords(place: Place, service: str) -> dict[str, str]:
    """The service's three PostgreSQL roles and their passwords."""
    return {role: place.secret(f"postgres.{service}.{role}") for role in ("owner", "request", "worker")}


def _login(url: str, user: str, password: str, *, query: str = "") -> str:
    """The administrator's URL with another user, password and query."""
    parts = urlsplit(url)
    netloc = f"{user}:{password}@{parts.hostname}:{parts.port}"
    return parts._replace(netloc=netloc, query=query.removeprefix("?")).geturl()
