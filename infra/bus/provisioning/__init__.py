"""Makes the brokers agree with the catalog: reports each difference, makes safe changes, and refuses all others.

It uses Kafka's admin protocol, and RabbitMQ's management API, which can also list existing queues.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import unquote, urlsplit

import httpx
from aiokafka.admin import AIOKafkaAdminClient

from infra.bus.provisioning.drift import Drift, DriftRefused, ProvisioningError
from infra.bus.provisioning.kafka import Topics
from infra.bus.provisioning.kafka_accounts import Rights, grant
from infra.bus.provisioning.rabbit import Queues
from infra.connections import kafka_options
from protos.topology import Catalog

__all__ = ["Drift", "DriftRefused", "ProvisioningError", "Rights", "apply", "grant", "plan"]

# How long a change may take until the brokers show it, seconds.
_SETTLE_SECONDS = 15.0


async def plan(catalog: Catalog, *, kafka: str, rabbit_url: str, management_url: str, prefix: str = "") -> list[Drift]:
    """The differences between `catalog` and the brokers.

    kafka: as `infra.connections` reads it. prefix: stands before every topic's name.
    rabbit_url: ``amqp://…/vhost``; only the virtual host is used.
    management_url: ``http://user:password@host:port``; the user needs all permissions in the virtual host.
    """
    async with _brokers(kafka, rabbit_url, management_url, prefix) as (topics, queues):
        return [*await topics.drift(catalog.topics), *await queues.drift(catalog.queues)]


async def apply(catalog: Catalog, *, kafka: str, rabbit_url: str, management_url: str, prefix: str = "") -> list[Drift]:
    """Makes the brokers agree with `catalog`. Returns the differences that it removed. Arguments as of `plan`.

    Raises DriftRefused, before the first change, if something differs that cannot be changed safely, and
    ProvisioningError if a broker refuses a change or does not show it afterwards.
    """
    async with _brokers(kafka, rabbit_url, management_url, prefix) as (topics, queues):

        async def differences() -> list[Drift]:
            drifts = [*await topics.drift(catalog.topics), *await queues.drift(catalog.queues)]
            return [drift for drift in drifts if not drift.extra]

        changed = await differences()
        refused = [drift for drift in changed if not drift.fixable]
        if refused:
            raise DriftRefused(refused)
        subjects = {drift.subject for drift in changed}
        await topics.mend(catalog.topics, subjects)
        await queues.mend(catalog.queues, subjects)
        deadline = asyncio.get_running_loop().time() + _SETTLE_SECONDS
        while changed and (left := await differences()):
            if asyncio.get_running_loop().time() > deadline:
                raise ProvisioningError("changed, but the broker does not show it:\n" + "\n".join(map(str, left)))
            await asyncio.sleep(0.1)
        return changed


@asynccontextmanager
async def _brokers(
    kafka: str, rabbit_url: str, management_url: str, prefix: str
) -> AsyncIterator[tuple[Topics, Queues]]:
    url = urlsplit(management_url)
    vhost = unquote(urlsplit(rabbit_url).path.removeprefix("/")) or "/"
    auth = (unquote(url.username or ""), unquote(url.password or ""))
    admin = AIOKafkaAdminClient(**kafka_options(kafka))
    try:
        await admin.start()
        base = f"{url.scheme}://{url.hostname}:{url.port}/api"
        async with httpx.AsyncClient(base_url=base, auth=auth, timeout=10) as management:
            yield Topics(admin, prefix), Queues(management, vhost)
    finally:
        await admin.close()
