"""New keys of a running service under load: no request fails, and the old keys are worth nothing afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import httpx
import jwt
import pytest

from infra.errors import Unauthenticated
from infra.security import auth
from infra.security.auth import IDENTITY_HEADER, SCOPES, Callers, Identities, Identity
from infra.security.crypto import Cipher
from infra.security.keys import Keyring
from infra.security.subjects import SubjectKeys
from infra.web import rpc
from infra.web.rpc_client import Channels
from protos.user.v1 import user_pb2, user_pb2_grpc
from tooling.cli import rotate
from tooling.stack import keys
from tooling.testing.platform import Platform

SERVICES = ("user", "ws_gateway")
WORKERS = 4


class Load:
    """Workers that write through HTTP and ask by gRPC. Each failure ends a worker."""

    def __init__(self, platform: Platform, folder: Path, tenant_id: str) -> None:
        self.done = [0] * WORKERS
        self.tokens = [""] * WORKERS
        self._platform = platform
        self._identities = Identities(keyring(folder, "user"))
        self._callers = Callers(keyring(folder, "ws_gateway"))
        self._who = Identity("api_key:test", tenant_id, frozenset(SCOPES), str(uuid4()))

    async def work(self, n: int) -> None:
        channels = Channels(self._callers)
        stub = user_pb2_grpc.KeysStub(channels.to(self._platform.grpc("user"), "user"))
        tenant_id = self._who.tenant_id
        async with httpx.AsyncClient(base_url=self._platform.url("user"), trust_env=False, timeout=60) as client:
            while True:
                token = self._callers.token("user", tenant_id)
                who = replace(self._who, key_id=str(uuid4()))
                request = user_pb2.ScopesRequest(key_id=who.key_id, token=self._identities.token(who, "ws_gateway"))
                await stub.Scopes(request, metadata=rpc.tenant_metadata(tenant_id), timeout=60)
                member = {"email": f"{uuid4().hex}@acme.example", "role": "viewer"}
                headers = {
                    IDENTITY_HEADER: self._identities.token(self._who, "user"),
                    "Idempotency-Key": uuid4().hex,
                }
                answer = await client.post("/api/v1/members", json=member, headers=headers)
                assert answer.status_code == 201, answer.text
                listed = await client.get("/api/v1/members?limit=200", headers=headers)
                assert listed.status_code == 200, listed.text
                self.tokens[n] = token
                self.done[n] += 1

    async def go_on(self, rounds: int) -> None:
        """Waits until each worker has done this number of rounds more."""
        goal = [done + rounds for done in self.done]
        while any(done < wanted for done, wanted in zip(self.done, goal, strict=True)):
            await asyncio.sleep(0.05)


def keyring(folder: Path, service: str) -> Keyring:
    return Keyring(service, keys.private_file(folder, service), keys.public_file(folder))


@asynccontextmanager
async def under_load(load: Load) -> AsyncIterator[Callable[[Awaitable[None]], Awaitable[None]]]:
    """Runs a step while the workers work. A failed worker fails the step."""
    workers = [asyncio.create_task(load.work(n)) for n in range(WORKERS)]

    async def step(work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        ended, _ = await asyncio.wait([task, *workers], return_when=asyncio.FIRST_COMPLETED, timeout=300)
        for one in ended:
            one.result()
        assert task in ended

    try:
        yield step
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    keys.make_keys(folder, SERVICES)
    return folder


@pytest.fixture(scope="module")
async def load(platform: Platform, folder: Path) -> Load:
    await platform.prepare("user")
    await platform.start(
        "user",
        CLAW_PRIVATE_KEY_FILE=str(keys.private_file(folder, "user")),
        CLAW_PUBLIC_KEYS_FILE=str(keys.public_file(folder)),
        CLAW_MASTER_KEY_FILE=str(keys.master_file(folder, "user")),
    )
    operator = Identity("operator", "", frozenset(SCOPES))
    headers = {IDENTITY_HEADER: Identities(keyring(folder, "user")).token(operator, "user")}
    async with httpx.AsyncClient(base_url=platform.url("user"), trust_env=False, timeout=60) as client:
        made = await client.post("/api/v1/tenants", json={"name": "Acme"}, headers=headers)
    return Load(platform, folder, made.json()["id"])


async def test_the_key_pairs_change_without_a_refused_call(
    load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A token is made again after a tenth of a second.
    monkeypatch.setattr(auth, "LIFETIME_SECONDS", 0.2)
    old = keyring(folder, "ws_gateway").sign("user", tenant="t1")

    async def settle(_: float) -> None:
        while any(kid(token) == kid(old) for token in load.tokens):
            await load.go_on(1)

    async with under_load(load) as step:
        await step(load.go_on(2))
        await step(rotate.rotate_internal(folder, SERVICES, settle))
        await step(load.go_on(3))
    with pytest.raises(Unauthenticated, match=r"is not in keys\.json"):
        keyring(folder, "user").verify(old, "user")


def kid(token: str) -> str:
    return str(jwt.get_unverified_header(token)["kid"]) if token else ""


async def test_the_master_key_changes_without_a_failed_request(load: Load, folder: Path, platform: Platform) -> None:
    old = keys.master_file(folder, "user").read_text()

    async def settle(_: float) -> None:
        # The service looks at the file once a second.
        await asyncio.sleep(2)
        await load.go_on(2)

    async def rotation() -> None:
        assert await rotate.rotate_master(folder, platform.database_url, ("user",), settle) > 0

    async with under_load(load) as step:
        await step(load.go_on(2))
        await step(rotation())
        await step(load.go_on(2))
    only_new = keys.master_file(folder, "user").read_text()
    assert len(only_new.split()) == 1
    assert only_new != old == keys.retired_file(folder, "user").read_text()
    async with platform.database("user").begin() as tx:
        subjects = await tx.sql("SELECT tenant_id, subject_id FROM subject_key WHERE wrapped IS NOT NULL")
        answers = await tx.sql("SELECT answer, tenant_id, route, key FROM idempotency WHERE answer IS NOT NULL")
        await SubjectKeys(Cipher(only_new)).keys(tx, [(tenant, subject) for tenant, subject in subjects])
    for answer, *place in answers:
        Cipher(only_new).open(answer, "idempotency", *place)
    assert len(subjects) > 10
    assert len(answers) > 10
