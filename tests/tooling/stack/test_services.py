"""Tests of the accounts that `up` makes: each service has its own user in each engine, with the least rights."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import AsyncIterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import aiormq
import asyncpg
import psutil
import pytest
import redis.asyncio
from pydantic import SecretStr
from redis.exceptions import NoPermissionError

from infra.errors import TooManyRequests
from infra.service.settings import Settings
from infra.stores.cache import Cache
from protos.pubsub import CHANNELS
from tooling.stack.engines import ENGINES
from tooling.stack.engines.base import Place, Secrets
from tooling.stack.home import SERVICES, Home
from tooling.stack.provision import provision
from tooling.stack.services import LocalService
from tooling.stack.supervisor import end_all, orphans
from tooling.testing.stack import private_home, run_claw


@pytest.fixture(scope="module")
async def place() -> AsyncIterator[Place]:
    """A stack of its own, provisioned with the topics, queues and users of the catalog."""
    with private_home() as home:
        run_claw(home, "up", "--only", "postgres,valkey,kafka,rabbitmq")
        place = Place(home, Home(home).place().ports, Secrets(home / "secrets.json"), SERVICES)
        await provision(place)
        await provision(place)
        yield place


@pytest.fixture
def settings(place: Place, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings that the agent service reads when `up` starts it."""
    LocalService("agent").prepare(place)
    for name, value in LocalService("agent").program(place).environment.items():
        monkeypatch.setenv(name, value)
    return Settings.load()


async def test_the_worker_role_reaches_its_own_schema_only(settings: Settings) -> None:
    connection = await asyncpg.connect(settings.database_url.get_secret_value())
    assert await connection.fetchval("SELECT count(*) FROM outbox") == 0
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.fetchval("SELECT count(*) FROM billing.outbox")
    await connection.close()


async def test_the_request_role_may_log_in(settings: Settings) -> None:
    connection = await asyncpg.connect(settings.request_database_url.get_secret_value())
    assert await connection.fetchval("SELECT current_user") == "agent_request"
    await connection.close()


async def test_the_rabbitmq_user_publishes_where_it_sends_and_nowhere_else(settings: Settings) -> None:
    connection = await aiormq.connect(settings.rabbitmq_url.get_secret_value())
    channel = await connection.channel()
    await channel.basic_publish(b"{}", exchange="channel.outbound", routing_key="channel.outbound", mandatory=True)
    with pytest.raises(aiormq.exceptions.ChannelAccessRefused):
        await channel.basic_publish(b"{}", exchange="notification", routing_key="notification.email")
        await channel.basic_publish(b"{}", exchange="notification", routing_key="notification.email")
    await connection.close()


async def test_the_rabbitmq_user_reads_its_own_queues_only(settings: Settings) -> None:
    connection = await aiormq.connect(settings.rabbitmq_url.get_secret_value())
    channel = await connection.channel()
    await channel.basic_get("channel.inbound.telegram")
    with pytest.raises(aiormq.exceptions.ChannelAccessRefused):
        await channel.basic_get("document.index")
    await connection.close()


@pytest.mark.parametrize("name", SERVICES)
async def test_a_redis_user_has_the_keys_of_limits_and_its_own_channels_only(place: Place, name: str) -> None:
    url = urlsplit(ENGINES["valkey"].access(place)["url"])
    login = f"{name}:{place.secret(f'valkey.{name}')}@{url.hostname}:{url.port}"
    async with redis.asyncio.Redis.from_url(f"redis://{login}/0") as client:
        await Cache(client).limit(f"an {name}", "login", times=1, seconds=60)
        with pytest.raises(TooManyRequests):
            await Cache(client).limit(f"an {name}", "login", times=1, seconds=60)
        own = CHANNELS.get(name, ())
        for channel in {each for channels in CHANNELS.values() for each in channels}:
            allowed = nullcontext() if channel in own else pytest.raises(NoPermissionError)
            with allowed:
                await client.publish(channel.replace("*", "1"), b"x")
            async with client.pubsub() as listener:
                with allowed:
                    await listener.psubscribe(channel)
                    await listener.get_message(timeout=20)
        async with client.pubsub() as listener:
            with pytest.raises(NoPermissionError):
                await listener.psubscribe("*")
                await listener.get_message(timeout=20)
        for refused in (client.flushall(), client.get("session:a"), client.set("lock:x", "1"), client.keys("*")):
            with pytest.raises(NoPermissionError):
                await refused


@pytest.mark.parametrize("service", SERVICES)
def test_no_secret_is_in_the_environment_of_a_service(
    service: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = LocalService(service)
    part.prepare(place)
    environment = part.program(place).environment
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = importlib.import_module(f"services.{service}.__main__").service.settings.load()
    secrets = [getattr(settings, field) for field in type(settings).model_fields]
    values = {secret.get_secret_value() for secret in secrets if isinstance(secret, SecretStr)}
    assert len(values) >= 4
    assert not [name for name, value in environment.items() if value in values]
    folder = place.home / service / "secrets"
    assert {path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())} == {0o700, 0o600}


def test_a_service_that_hides_its_environment_is_found_and_ended(place: Place, tmp_path: Path) -> None:
    other = replace(place, home=tmp_path)
    *options, _, _ = LocalService("memory").program(other).command
    # A program that writes has been started for sure.
    command = [*options, "-uc", "print('up'); input()"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={})
    assert process.stdout
    assert process.stdout.readline() == b"up\n"
    try:
        assert [found.pid for found in orphans(other.home)] == [process.pid]
        end_all(other.home, kill=True)
        assert not psutil.pid_exists(process.pid)
    finally:
        process.kill()
        process.communicate()
