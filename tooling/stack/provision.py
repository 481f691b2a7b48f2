"""Makes the roles, schemas, tables, topics, queues and permissions that the services need at their start."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote, unquote, urlsplit

import httpx

from infra.bus import provisioning
from infra.postgres.schema import Passwords, migrate, prepare_database
from protos.catalog import CATALOG
from protos.topology import Catalog, Queue
from tooling.stack.checkout import CHECKOUT
from tooling.stack.engines import ENGINES
from tooling.stack.engines.base import EngineError, Place
from tooling.stack.home import SERVICES
from tooling.stack.operator import resend_everywhere
from tooling.stack.services import passwords


async def provision(place: Place) -> None:
    """Makes roles, schemas, tables, topics, exchanges and queues, and gives each RabbitMQ user its permissions.

    Raises EngineError if a topic or queue differs from the catalog and cannot be changed safely.
    """
    rabbitmq = ENGINES["rabbitmq"].access(place)
    await bring_up_to_date(
        {name: Passwords(**passwords(place, name)) for name in SERVICES},
        {name: place.secret(f"rabbitmq.{name}") for name in SERVICES},
        {name: place.secret(f"kafka.{name}") for name in SERVICES},
        database=ENGINES["postgres"].access(place)["url"],
        kafka=ENGINES["kafka"].access(place)["bootstrap_servers"],
        rabbit_url=rabbitmq["url"],
        management_url=rabbitmq["management_url"],
    )


async def bring_up_to_date(
    database_passwords: Mapping[str, Passwords],
    rabbitmq_passwords: Mapping[str, str],
    kafka_passwords: Mapping[str, str],
    *,
    database: str,
    kafka: str,
    rabbit_url: str,
    management_url: str,
) -> None:
    """As `provision`, on any engines. All URLs are the administrator's. A Kafka without logins gets no accounts."""
    await prepare_database(database, database_passwords)
    for name in SERVICES:
        if (revisions := CHECKOUT / "services" / name / "migrations").exists():
            await migrate(database, name, revisions)
    try:
        await provision_brokers(CATALOG, database, kafka=kafka, rabbit_url=rabbit_url, management_url=management_url)
    except provisioning.ProvisioningError as error:
        raise EngineError(str(error)) from error
    if "://" in kafka:
        await provisioning.grant(kafka, kafka_passwords, {name: topics_of(name) for name in SERVICES})
    url = urlsplit(management_url)
    base = f"http://{url.hostname}:{url.port}/api"
    vhost = quote(unquote(urlsplit(rabbit_url).path.removeprefix("/")) or "/", safe="")
    async with httpx.AsyncClient(auth=(url.username or "", url.password or ""), trust_env=False) as client:
        for name, password in rabbitmq_passwords.items():
            for path, body in (
                (f"users/{name}", {"password": password, "tags": ""}),
                (f"permissions/{vhost}/{name}", permissions(name)),
            ):
                (await client.put(f"{base}/{path}", json=body)).raise_for_status()


async def provision_brokers(catalog: Catalog, url: str, **brokers: str) -> dict[str, int]:
    """Makes the brokers agree with the catalog; `brokers` as in `provisioning.plan`.

    If a topic or queue is missing, its broker was wiped. Its messages are marked to be sent again before it is made:
    otherwise newer messages of a key could arrive before the older ones. Returns destination → number of such messages.
    """
    made = [drift.subject for drift in await provisioning.plan(catalog, **brokers) if drift.found == "-"]
    destinations = {topic.name for topic in catalog.topics if f"topic {brokers.get('prefix', '')}{topic.name}" in made}
    destinations |= {queue.exchange.name for queue in catalog.queues if f"queue {queue.name}" in made}
    sent: dict[str, int] = {}
    for destination in sorted(destinations):
        if count := sum((await resend_everywhere(url, destination)).values()):
            sent[destination] = count
    await provisioning.apply(catalog, **brokers)
    return sent


def topics_of(service: str) -> provisioning.Rights:
    """The topics that the service reads and writes, as `./claw map` shows them."""
    return provisioning.Rights(
        reads=frozenset(topic.name for topic in CATALOG.topics if service in topic.consumers),
        writes=frozenset(topic.name for topic in CATALOG.topics if service in topic.producers),
    )


def permissions(service: str) -> dict[str, str]:
    """The service's permissions in RabbitMQ: it publishes to its exchanges and reads its own queues.

    A consumer also publishes through the default exchange, to its retry queues and when it redrives a message.
    """
    own = [queue for queue in CATALOG.queues if queue.consumer == service]
    exchanges = {queue.exchange.name for queue in CATALOG.queues if service in queue.producers}
    if own:
        exchanges.add("amq.default")
    names = {name for queue in own for name in _queues(queue)}
    return {"configure": "^$", "write": _one_of(exchanges), "read": _one_of(names)}


def _queues(queue: Queue) -> set[str]:
    return {queue.name, queue.dead_letter_queue, *(queue.retry_queue(delay) for delay in queue.retries)}


def _one_of(names: set[str]) -> str:
    """A pattern that matches exactly these names."""
    return f"^({'|'.join(name.replace('.', '[.]') for name in sorted(names))})$"
