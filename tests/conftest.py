"""Real engines for all tests: one stack for the run, and a fresh corner of each engine for a module."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from tooling.testing.packages import extract
from tooling.testing.stack import Stack, running_stack

# Python's default. With the rare collections of our processes, an object that a test leaves open would be found in
# another test.
gc.set_threshold(700, 10, 10)

# Without this, a property fails because the machine is busy: Hypothesis measures how fast it gets its inputs.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


# The tests that use the whole system.
E2E = "tests/e2e/"
# Folders whose fixtures are made once for all their tests.
_SHARED = (E2E, "tests/security/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the whole system come first: they take longest, and no process then waits for them at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(E2E))


class ByWhatIsShared(LoadScopeScheduling):  # type: ignore[misc]
    """A module's tests run in one process, and so do all tests of a folder that shares its fixtures."""

    def _split_scope(self, nodeid: str) -> str:
        return next((folder for folder in _SHARED if nodeid.startswith(folder)), nodeid.split("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByWhatIsShared:
    return ByWhatIsShared(config, log)


@pytest.fixture(autouse=True)
def logging_stays_enabled() -> Iterator[None]:
    """A command that a test calls may disable logging for its process. A later test would then miss its lines."""
    yield
    assert logging.root.manager.disable == 0, "the test left logging disabled"


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """PostgreSQL, Valkey, Kafka and RabbitMQ, running. CLAW_TEST_STACK=<folder> uses one that runs already."""
    with running_stack() as running:
        yield running


@pytest.fixture(scope="session")
def prometheus_programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of Prometheus's programs, from Debian's package."""
    folder = tmp_path_factory.mktemp("prometheus")
    extract("prometheus", folder)
    return folder / "usr" / "bin"


@contextmanager
def fresh_database(stack: Stack) -> Iterator[str]:
    """The administrator's URL of a fresh database, which is dropped at the end."""
    name = f"t_{uuid.uuid4().hex}"
    execute(stack.postgres_url, f"CREATE DATABASE {name}")
    yield urlunsplit(urlsplit(stack.postgres_url)._replace(path=f"/{name}"))
    execute(stack.postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def fresh_vhost(stack: Stack) -> Iterator[str]:
    """The administrator's AMQP URL of a fresh virtual host, which is deleted at the end."""
    name = f"t_{uuid.uuid4().hex}"
    make_vhost(stack, name)
    yield urlunsplit(urlsplit(stack.rabbitmq_url)._replace(path=f"/{name}"))
    _manage(stack, "DELETE", f"/api/vhosts/{name}")


@contextmanager
def fresh_prefix(stack: Stack) -> Iterator[str]:
    """A prefix that no other test has; topics whose names begin with it are deleted at the end."""
    prefix = f"t{uuid.uuid4().hex}."
    yield prefix
    asyncio.run(_delete_topics(stack.kafka_bootstrap_servers, prefix))


@pytest.fixture(scope="module")
def database(stack: Stack) -> Iterator[str]:
    with fresh_database(stack) as url:
        yield url


@pytest.fixture(scope="module")
def vhost(stack: Stack) -> Iterator[str]:
    with fresh_vhost(stack) as url:
        yield url


@pytest.fixture(scope="module")
def topic_prefix(stack: Stack) -> Iterator[str]:
    with fresh_prefix(stack) as prefix:
        yield prefix


def make_vhost(stack: Stack, name: str) -> None:
    """Makes a virtual host in which the administrator may do everything."""
    _manage(stack, "PUT", f"/api/vhosts/{name}")
    _manage(stack, "PUT", f"/api/permissions/{name}/admin", {"configure": ".*", "write": ".*", "read": ".*"})


def execute(url: str, statement: str) -> None:
    """Runs one statement as the user of the URL."""

    async def run() -> None:
        connection = await asyncpg.connect(url)
        await connection.execute(statement)
        await connection.close()

    asyncio.run(run())


def _manage(stack: Stack, method: str, path: str, body: object = None) -> None:
    url = urlsplit(stack.rabbitmq_management_url)
    passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    address = f"http://{url.hostname}:{url.port}"
    passwords.add_password(None, address, url.username or "", url.password or "")
    opener = urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(passwords))
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}{path}", data=data, method=method)
    request.add_header("content-type", "application/json")
    opener.open(request, timeout=120).close()


async def _delete_topics(servers: str, prefix: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        if topics := [topic for topic in await admin.list_topics() if topic.startswith(prefix)]:
            await admin.delete_topics(topics)
    finally:
        await admin.close()
