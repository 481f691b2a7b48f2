"""``./claw up --tls``: both sides show certificates, clients verify names, and Kafka's accounts have rights."""

from __future__ import annotations

import asyncio
import logging
import ssl
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from unittest.mock import AsyncMock
from urllib.parse import parse_qsl, urlencode, urlsplit

import aio_pika
import asyncpg
import pytest
from aio_pika.connection import make_url
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    KafkaError,
    TopicAuthorizationFailedError,
)
from cryptography import x509
from faststream.rabbit import RabbitBroker
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError

from infra.bus.provisioning import Rights, grant
from infra.clock import utcnow
from infra.connections import TLS_FILES, kafka_options
from infra.errors import Transient, describe
from infra.postgres.db import create_engine, sql
from infra.stores.objects import Objects
from services.log_aggregator.index.search_index import SearchIndex
from services.memory.indexes.milvus import MilvusIndex
from tests.conftest import fresh_database
from tooling.cli.up import up
from tooling.stack import engines, tls_front
from tooling.stack.backup import database, take
from tooling.stack.engines import certificates
from tooling.stack.engines.base import EngineError, Place, Secrets, write_atomically
from tooling.stack.home import Home
from tooling.testing.certificates import Authority
from tooling.testing.stack import Stack, private_home, run_claw

# Its stack has seven engines, which a busy machine starts in minutes.
pytestmark = pytest.mark.timeout(600)
NAMES = ("postgres", "redis", "kafka", "rabbitmq", "opensearch", "milvus")


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A stack of its own, with TLS."""
    with private_home() as home:
        run_claw(home, "up", "--tls", "--only", "postgres,valkey,kafka,rabbitmq,opensearch,milvus,s3")
        yield Stack(home)


async def postgres(url: str) -> None:
    engine = create_engine(url, pool_size=1)
    try:
        async with engine.connect() as connection:
            assert await sql(connection, "SELECT 1") == [(1,)]
    finally:
        await engine.dispose()


async def redis(url: str) -> None:
    client = Redis.from_url(url)
    try:
        await client.ping()
    finally:
        await client.aclose()


async def kafka(servers: str) -> None:
    client = AIOKafkaAdminClient(**kafka_options(servers))
    try:
        await client.start()
        await client.list_topics()
    finally:
        await client.close()


async def rabbitmq(url: str) -> None:
    connection = aio_pika.Connection(make_url(url))
    try:
        await connection.connect(timeout=20)
    finally:
        # Also if it failed: an open one would be found in another test.
        await connection.close()


async def opensearch(url: str) -> None:
    async with aclosing(SearchIndex(url, "")) as index:
        await index.ping()


async def milvus(url: str) -> None:
    await MilvusIndex(url, "", "model", AsyncMock()).check()


CLIENTS: dict[str, Callable[[str], Awaitable[None]]] = {
    "postgres": postgres,
    "redis": redis,
    "kafka": kafka,
    "rabbitmq": rabbitmq,
    "opensearch": opensearch,
    "milvus": milvus,
}
# The errors of the drivers without a connection.
NO_CONNECTION = (OSError, ssl.SSLError, DBAPIError, RedisError, KafkaError, aio_pika.exceptions.AMQPError, Transient)

# An account without any topic to write may not even begin to produce.
UNAUTHORIZED = (TopicAuthorizationFailedError, ClusterAuthorizationFailedError)


def url_of(stack: Stack, name: str) -> str:
    return stack.kafka_bootstrap_servers if name == "kafka" else str(stack.engines[name]["url"])


def changed(url: str, files: Callable[[Path], Path | None], port: int | None = None) -> str:
    """The URL with other files; None leaves one out."""
    parts = urlsplit(url)
    query = [
        (key, str(file) if value.startswith("/") else value)
        for key, value in parse_qsl(parts.query)
        if (file := files(Path(value))) is not None
    ]
    netloc = parts.netloc if port is None else f"{parts.netloc.rpartition(':')[0]}:{port}"
    return parts._replace(query=urlencode(query, safe="/"), netloc=netloc).geturl()


@pytest.fixture
def empty(stack: Stack) -> Iterator[str]:
    with fresh_database(stack) as url:
        yield url


async def test_a_backup_reads_and_restores_the_database(
    stack: Stack, empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL's own programs know no TLS here, so they use the server's socket."""
    monkeypatch.setenv("CLAW_HOME", str(stack.home))
    found = take.source()
    assert found.tls
    url, socket = found.database_url, found.socket
    assert socket == engines.postgres.socket_folder(Home(stack.home).place())
    connection = await asyncpg.connect(url)
    await connection.execute("CREATE TABLE kept AS SELECT 7 AS n")
    await connection.close()
    async with database.snapshot(url) as taken:
        with pytest.raises(EngineError, match="pg_dump failed"):
            list(database.dump(url, taken))
        database.restore(empty, database.dump(url, taken, socket), socket)
    connection = await asyncpg.connect(empty)
    assert await connection.fetchval("SELECT n FROM kept") == 7
    await connection.close()
    assert b"PG_VERSION" in b"".join(database.base(url, socket))


@pytest.mark.parametrize("name", NAMES)
async def test_clients_connect_by_tls_only_with_a_certificate_and_to_a_server_of_their_authority(
    stack: Stack, name: str, tmp_path: Path
) -> None:
    url, client = url_of(stack, name), CLIENTS[name]
    assert "://" in url
    strange = tmp_path / "ca.pem"
    strange.write_text(Authority().certificate)
    with pytest.raises(NO_CONNECTION):
        await client(changed(url, lambda file: strange if file.name == "ca.pem" else file))
    with pytest.raises(NO_CONNECTION):
        await client(changed(url, lambda file: file if file.name not in TLS_FILES[1:] else None))
    # At the end: the client of Milvus would use an open connection to the same address again.
    await client(url)


@pytest.mark.parametrize("name", NAMES)
async def test_clients_refuse_a_server_of_their_authority_with_another_name(
    stack: Stack, name: str, tmp_path: Path
) -> None:
    async with impostor(stack, name, tmp_path) as (port, refused):
        with pytest.raises(NO_CONNECTION):
            await CLIENTS[name](changed(url_of(stack, name), lambda file: file, port))
        # The client has sent nothing: neither its first message nor its password.
        assert await asyncio.wait_for(refused.get(), 20)


async def test_the_object_store_is_known_by_its_authority_and_name(stack: Stack, tmp_path: Path) -> None:
    """It asks for no certificate, because its clients sign each request."""
    access = stack.engines["s3"]
    assert access["endpoint"].startswith("https://")
    await Objects(**access).put_once("a", b"x")
    assert await Objects(**access).paths("") == ["a"]
    strange = tmp_path / "ca.pem"
    strange.write_text(Authority().certificate)
    with pytest.raises(Transient):
        await Objects(**access | {"endpoint": changed(access["endpoint"], lambda _: strange)}).paths("")
    async with impostor(stack, "s3", tmp_path) as (port, refused):
        with pytest.raises(Transient):
            await Objects(**access | {"endpoint": changed(access["endpoint"], lambda file: file, port)}).paths("")
        assert await asyncio.wait_for(refused.get(), 20)


async def test_faststream_connects_by_tls(stack: Stack) -> None:
    broker = RabbitBroker(url_of(stack, "rabbitmq"))
    await broker.connect()
    try:
        assert await broker.ping(10)
    finally:
        await broker.stop()


def test_only_the_owner_can_read_the_keys_and_nothing_listens_without_tls(stack: Stack) -> None:
    keys = [path for path in (stack.home / "tls").rglob("*") if path.suffix == ".key" or path.name.startswith("key")]
    assert len(keys) > 10
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    assert (stack.home / "valkey" / "valkey.conf").read_text().count("port 0") == 1


def test_a_stack_that_runs_keeps_the_files_of_its_certificates(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes have read them; `status` tells from the files when they end."""
    file = certificates.folder(Home(stack.home).place(), "valkey") / "certificate.pem"
    before = file.read_text()
    monkeypatch.setenv("CLAW_HOME", str(stack.home))
    monkeypatch.setattr(certificates, "RENEWED", certificates.LIFE)
    up(only="valkey")
    logging.disable(logging.NOTSET)
    assert file.read_text() == before


class Calendar:
    """The days of a stack with one certificate."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place = Place(home, {}, Secrets(home / "secrets.json"))
        self.now = utcnow()
        monkeypatch.setattr(certificates, "utcnow", lambda: self.now)

    def end(self) -> datetime:
        """Of the certificate that is in the file."""
        file = certificates.folder(self.place, "agent") / "certificate.pem"
        return x509.load_pem_x509_certificate(file.read_bytes()).not_valid_after_utc


@pytest.fixture
def calendar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calendar:
    return Calendar(tmp_path, monkeypatch)


@pytest.mark.parametrize("days", range(30, 61, 2))
def test_no_certificate_ends_in_a_stack_that_is_restarted_once_in_60_days(calendar: Calendar, days: int) -> None:
    for _ in range(5):
        certificates.issue(calendar.place, ["agent"])
        calendar.now += timedelta(days=days)
        assert calendar.end() > calendar.now


def test_a_certificate_is_replaced_only_at_a_start_and_if_it_does_not_last(calendar: Calendar) -> None:
    certificates.issue(calendar.place, ["agent"])
    first = calendar.end()
    assert first <= calendar.now + certificates.LIFE
    calendar.now += timedelta(days=29)
    certificates.issue(calendar.place, ["agent"])
    calendar.now += timedelta(days=60)
    certificates.issue(calendar.place, ["agent"], renew=False)
    assert calendar.end() == first
    certificates.issue(calendar.place, ["agent"])
    assert calendar.end() > first


def test_status_warns_before_a_certificate_ends(calendar: Calendar) -> None:
    assert certificates.problem(calendar.place, "agent") is None
    certificates.issue(calendar.place, ["agent"])
    found = []
    for day in (0, 75, 77, 91):
        calendar.now = calendar.end() - timedelta(days=90 - day)
        found.append(certificates.problem(calendar.place, "agent"))
    advice = "restart the stack with ./claw down and ./claw up"
    assert found == [None, None, f"its certificate ends in 13 days: {advice}", f"its certificate has ended: {advice}"]


async def test_an_account_of_kafka_has_the_rights_to_its_own_topics_and_groups_only(stack: Stack) -> None:
    servers = stack.kafka_bootstrap_servers
    admin = AIOKafkaAdminClient(**kafka_options(servers))
    await admin.start()
    await admin.create_topics([NewTopic(topic, 1, 1) for topic in ("own", "other")])
    await admin.close()
    reads, writes = frozenset(("own",)), frozenset(("own",))
    await grant(servers, {"agent": "a-pw", "memory": "m-pw"}, {"agent": Rights(reads, writes)})
    agent, memory = account(servers, "agent", "a-pw"), account(servers, "memory", "m-pw")

    await send(agent, "own")
    for who, topic in ((agent, "other"), (memory, "own")):
        with pytest.raises(UNAUTHORIZED):
            await send(who, topic)
    assert await receive(agent, "own", "agent_index") == b"x"
    with pytest.raises(GroupAuthorizationFailedError):
        await receive(agent, "own", "memory")
    with pytest.raises(KafkaError):
        await kafka(account(servers, "agent", "m-pw"))

    # Rights that are not wanted any more are taken away, and the password is replaced.
    await grant(servers, {"agent": "new-pw"}, {"agent": Rights(reads, frozenset())})
    agent = account(servers, "agent", "new-pw")
    with pytest.raises(UNAUTHORIZED):
        await send(agent, "own")
    assert await receive(agent, "own", "agent_other") == b"x"


def account(servers: str, user: str, password: str) -> str:
    parts = urlsplit(servers)
    query = urlencode([pair for pair in parse_qsl(parts.query) if pair[0] != "mechanism"], safe="/")
    return parts._replace(netloc=f"{user}:{password}@{parts.hostname}:{parts.port}", query=query).geturl()


async def send(servers: str, topic: str) -> None:
    producer = AIOKafkaProducer(**kafka_options(servers), enable_idempotence=True)
    try:
        await producer.start()
        await producer.send_and_wait(topic, b"x")
    finally:
        await producer.stop()


async def receive(servers: str, topic: str, group: str) -> bytes:
    options = kafka_options(servers) | {"group_id": group, "auto_offset_reset": "earliest"}
    consumer = AIOKafkaConsumer(topic, **options)
    try:
        await consumer.start()
        return bytes((await asyncio.wait_for(consumer.getone(), 30)).value)
    finally:
        await consumer.stop()


@asynccontextmanager
async def impostor(stack: Stack, name: str, folder: Path) -> AsyncIterator[tuple[int, asyncio.Queue[str]]]:
    """A server with a certificate of the stack's authority for the name ``other`` alone: port, and ended handshakes."""
    home = stack.home / "tls"
    private = certificates._authority(home)
    made, key = certificates._issued(private, "other", addresses=())
    for file, text in zip(
        TLS_FILES,
        ((home / "authority.pem").read_text(), certificates._pem(made), certificates._private_pem(key)),
        strict=True,
    ):
        write_atomically(folder / file, text)
    context = tls_front.server_context(folder)
    refused: asyncio.Queue[str] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if name == "postgres":
                await reader.readexactly(8)
                writer.write(b"S")
            await writer.start_tls(context)
            # With TLS 1.3 the server's part of the handshake ends before the client has looked at the certificate.
            if await reader.read(1) == b"":
                refused.put_nowait("closed")
        except (OSError, EOFError) as error:
            refused.put_nowait(describe(error))
        writer.transport.abort()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], refused
