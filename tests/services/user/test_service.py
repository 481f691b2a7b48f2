"""The real process on real engines: tenants, keys, members, and authentication."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest

from infra.clock import utcnow
from infra.errors import Forbidden, InvalidMessage
from infra.postgres.db import create_engine
from infra.postgres.schema import role_url
from infra.security.auth import IDENTITY_HEADER, Identity
from infra.web import rpc
from protos.user.v1 import user_pb2, user_pb2_grpc
from services.user.api_keys import MAX_KEYS
from services.user.members import MAX_ERASED_A_DAY, MAX_OWNERS
from tooling.testing import keys
from tooling.testing.keys import identities
from tooling.testing.platform import ADMIN_TOKEN, PASSWORDS, Platform


@pytest.fixture(scope="module")
async def user(platform: Platform) -> Platform:
    await platform.prepare("user")
    await platform.start("user")
    return platform


@pytest.fixture
async def operator(user: Platform) -> AsyncIterator[httpx.AsyncClient]:
    async with user.client("user") as client:
        yield client


@pytest.fixture
async def tenant(user: Platform, operator: httpx.AsyncClient) -> AsyncIterator[httpx.AsyncClient]:
    """A fresh tenant's client with every scope."""
    made = (await operator.post("/api/v1/tenants", json={"name": "Acme"})).json()
    async with user.client("user", made["id"]) as client:
        yield client


async def who_is(user: Platform, token: str, scheme: str = "Bearer", tenant: str = "") -> Identity | None:
    """The identity that the gateway gets for this bearer."""
    headers = {
        "Authorization": f"{scheme} {token}",
        "X-Claw-Service": "agent",
        **({"X-Claw-Tenant": tenant} if tenant else {}),
    }
    async with httpx.AsyncClient(base_url=user.url("user"), trust_env=False) as client:
        answer = await client.get("/internal/auth", headers=headers)
    if answer.status_code == 401:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["www-authenticate"] == "Bearer"
        return None
    assert (answer.status_code, answer.content) == (200, b"")
    return keys.identities("agent").verify(answer.headers[IDENTITY_HEADER], "GET", "/")


def fields(answer: httpx.Response) -> list[str]:
    """The fields that a 422 names."""
    assert answer.status_code == 422, answer.text
    return [error["field"] for error in answer.json()["errors"]]


async def test_a_new_tenant_is_announced_and_its_first_key_works_at_once(
    user: Platform, operator: httpx.AsyncClient
) -> None:
    body = {"name": "Tea & Co", "currency": "EUR", "credit_nanos": 5, "owner_email": "olga@tea.example"}
    answer = await operator.post("/api/v1/tenants", json=body)
    assert answer.status_code == 201
    made = answer.json()
    assert made.keys() == {"id", "name", "api_key"}
    identity = await who_is(user, made["api_key"])
    assert identity is not None
    assert identity.tenant_id == made["id"]
    assert identity.actor.startswith("api_key:")
    assert identity.scopes == {"read", "run", "write", "admin"}
    facts = await user.outbox("user", "platform.events")
    [(headers, fact)] = [(headers, fact) for headers, fact in facts if fact["tenant_id"] == made["id"]]
    assert fact == {"tenant_id": made["id"], "name": "Tea & Co", "currency": "EUR", "credit_nanos": 5}
    assert (headers["ce_type"], headers["ce_subject"], headers["tenant_id"]) == (
        "user.v1.TenantCreated",
        made["id"],
        made["id"],
    )
    async with user.client("user", made["id"]) as client:
        own = (await client.get("/api/v1/tenant")).json()
        owners = (await client.get("/api/v1/members")).json()["items"]
    assert (own["id"], own["name"], own["currency"]) == (made["id"], "Tea & Co", "EUR")
    assert [(owner["email"], owner["role"], owner["name"]) for owner in owners] == [("olga@tea.example", "owner", None)]


async def test_the_operator_is_known_by_the_admin_token_and_nobody_else_is(user: Platform) -> None:
    assert await who_is(user, ADMIN_TOKEN) == Identity("operator", "", frozenset(("read", "run", "write", "admin")))
    assert await who_is(user, ADMIN_TOKEN, scheme="bearer") is not None
    assert await who_is(user, ADMIN_TOKEN, scheme="Basic") is None
    assert await who_is(user, ADMIN_TOKEN[:-1]) is None
    assert await who_is(user, "claw_" + "x" * 43) is None
    async with httpx.AsyncClient(base_url=user.url("user"), trust_env=False) as client:
        assert (await client.get("/internal/auth")).status_code == 401


async def test_the_operator_may_act_for_a_tenant_and_a_key_only_for_its_own(
    user: Platform, operator: httpx.AsyncClient
) -> None:
    first, second = [(await operator.post("/api/v1/tenants", json={"name": name})).json() for name in ("A", "B")]
    everything = frozenset(("read", "run", "write", "admin"))
    assert await who_is(user, ADMIN_TOKEN, tenant=first["id"]) == Identity("operator", first["id"], everything)
    assert await who_is(user, ADMIN_TOKEN, tenant="no such tenant") is None
    own = await who_is(user, first["api_key"], tenant=second["id"])
    assert own is not None
    assert own.tenant_id == first["id"]


async def test_a_tenant_cannot_make_or_list_tenants_and_the_operator_has_none(
    operator: httpx.AsyncClient, tenant: httpx.AsyncClient
) -> None:
    assert (await tenant.post("/api/v1/tenants", json={"name": "Mine"})).status_code == 403
    assert (await tenant.get("/api/v1/tenants")).status_code == 403
    assert (await operator.get("/api/v1/tenant")).status_code == 403


async def test_tenants_are_listed_in_pages(operator: httpx.AsyncClient) -> None:
    made = [(await operator.post("/api/v1/tenants", json={"name": f"T{n}"})).json()["id"] for n in range(3)]
    seen: list[str] = []
    cursor: dict[str, Any] = {}
    while True:
        answer = (await operator.get("/api/v1/tenants", params={"limit": 2, **cursor})).json()
        assert len(answer["items"]) <= 2
        seen += [item["id"] for item in answer["items"]]
        if not answer["next"]:
            break
        cursor = {"cursor": answer["next"]}
    assert set(made) <= set(seen)
    assert len(set(seen)) == len(seen)
    assert fields(await operator.get("/api/v1/tenants", params={"cursor": "bm90IGFuIGlk"})) == ["cursor"]


async def test_the_same_idempotency_key_makes_one_tenant_and_shows_only_the_prefix_of_its_key_again(
    operator: httpx.AsyncClient,
) -> None:
    headers = {"Idempotency-Key": str(uuid4())}
    first, again = [await operator.post("/api/v1/tenants", json={"name": "Once"}, headers=headers) for _ in range(2)]
    made = first.json()
    shown = f"{made['api_key'][:12]}… (shown only in the first answer)"
    assert (again.status_code, again.json()) == (201, {**made, "api_key": shown})
    assert fields(await operator.post("/api/v1/tenants", json={"name": "Other"}, headers=headers)) == [
        "Idempotency-Key"
    ]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("tenants", {}, "name"),
        ("tenants", {"name": " "}, "name"),
        ("tenants", {"name": "a\x00b"}, "name"),
        ("tenants", {"name": "a\u202eb"}, "name"),
        ("tenants", {"name": "Acme\u200b"}, "name"),
        ("tenants", {"name": "x", "currency": "usd"}, "currency"),
        ("tenants", {"name": "x", "credit_nanos": -1}, "credit_nanos"),
        ("tenants", {"name": "x", "credit_nanos": 2**63}, "credit_nanos"),
        ("tenants", {"name": "x", "credit": 1}, "credit"),
        ("api-keys", {"name": "x", "scopes": ["root"]}, "scopes[0]"),
        ("api-keys", {"name": "x", "scopes": []}, "scopes"),
        ("api-keys", {"name": "x", "expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ("api-keys", {"name": "x", "expires_at": "2099-01-01T00:00:00"}, "expires_at"),
        ("api-keys", {"name": "x", "member_id": str(uuid4())}, "member_id"),
        ("members", {"email": "not an address", "role": "viewer"}, "email"),
        ("members", {"email": "a@b.example\r\nBcc: c@d.example", "role": "viewer"}, "email"),
        ("members", {"email": "a@b.example", "role": "king"}, "role"),
    ],
)
async def test_bad_input_is_refused_and_the_field_named(
    operator: httpx.AsyncClient, tenant: httpx.AsyncClient, path: str, body: dict[str, Any], field: str
) -> None:
    client = operator if path == "tenants" else tenant
    assert fields(await client.post(f"/api/v1/{path}", json=body)) == [field]


async def test_a_key_is_shown_once_and_stored_as_a_hash(user: Platform, tenant: httpx.AsyncClient) -> None:
    made = (await tenant.post("/api/v1/api-keys", json={"name": "ci", "scopes": ["read", "run"]})).json()
    assert made.keys() == {"id", "api_key", "prefix"}
    assert made["api_key"].startswith(made["prefix"])
    assert len(made["api_key"]) == 48
    listed = await tenant.get("/api/v1/api-keys")
    assert made["api_key"] not in listed.text
    [item] = [item for item in listed.json()["items"] if item["id"] == made["id"]]
    assert (item["prefix"], item["scopes"], item["expires_at"]) == (made["prefix"], ["read", "run"], None)
    async with user.database("user").begin() as tx:
        [(row,)] = await tx.sql("SELECT row_to_json(k)::text FROM api_key k WHERE id = $1::text::uuid", made["id"])
        [(stored,)] = await tx.sql("SELECT hash FROM api_key WHERE id = $1::text::uuid", made["id"])
    assert made["api_key"] not in row
    assert stored == hashlib.sha256(made["api_key"].encode()).digest()
    identity = await who_is(user, made["api_key"])
    assert identity is not None
    assert identity.scopes == {"read", "run"}


async def test_a_tenant_has_a_limited_number_of_keys(user: Platform, tenant: httpx.AsyncClient) -> None:
    made = (await tenant.post("/api/v1/api-keys", json={"name": "first"})).json()
    async with user.database("user").begin() as tx:
        await tx.sql(
            """
            INSERT INTO api_key (id, tenant_id, name, prefix, hash, scopes, created_by, expires_at)
            SELECT gen_random_uuid(), tenant_id, 'x', 'x', sha256(convert_to($1 || n, 'UTF8')), '{}', 'x',
                CASE WHEN n > $2 THEN now() END
            FROM api_key, generate_series(1, $2 + 10) AS n WHERE id = $1::uuid
            """,
            made["id"],
            # The tenant has its first key, too.
            MAX_KEYS - 2,
        )
    refused = await tenant.post("/api/v1/api-keys", json={"name": "more"})
    assert (refused.status_code, refused.json()["detail"]) == (
        409,
        f"a tenant may have {MAX_KEYS} API keys; revoke one first",
    )
    assert (await tenant.delete(f"/api/v1/api-keys/{made['id']}")).status_code == 204
    # One place is left, and another transaction is about to take it.
    tenant_id = (await tenant.get("/api/v1/tenant")).json()["id"]
    async with user.database("user").begin() as tx:
        await tx.take_turn(f"API keys of {tenant_id}")
        await tx.sql(
            """
            INSERT INTO api_key (id, tenant_id, name, prefix, hash, scopes, created_by)
            VALUES (gen_random_uuid(), $1, 'x', 'x', sha256(convert_to($1, 'UTF8')), '{}', 'x')
            """,
            tenant_id,
        )
        asked = asyncio.create_task(tenant.post("/api/v1/api-keys", json={"name": "more"}))

        async def waits() -> bool:
            return asked.done() or bool(
                await tx.sql("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
            )

        await user.until(waits)
        assert not asked.done()
    assert (await asked).status_code == 409


async def test_a_revoked_key_and_one_that_expired_let_nobody_in(user: Platform, tenant: httpx.AsyncClient) -> None:
    revoked = (await tenant.post("/api/v1/api-keys", json={"name": "a"})).json()
    assert await who_is(user, revoked["api_key"])
    assert (await tenant.delete(f"/api/v1/api-keys/{revoked['id']}")).status_code == 204
    assert await who_is(user, revoked["api_key"]) is None
    assert (await tenant.delete(f"/api/v1/api-keys/{revoked['id']}")).status_code == 404
    later = (utcnow() + timedelta(hours=1)).isoformat()
    expiring = (await tenant.post("/api/v1/api-keys", json={"name": "b", "expires_at": later})).json()
    assert await who_is(user, expiring["api_key"])
    async with user.database("user").begin() as tx:
        await tx.sql("UPDATE api_key SET expires_at = now() WHERE id = $1::text::uuid", expiring["id"])
    assert await who_is(user, expiring["api_key"]) is None


async def test_a_key_gets_no_scope_that_its_maker_lacks(user: Platform, tenant: httpx.AsyncClient) -> None:
    own = (await tenant.get("/api/v1/tenant")).json()["id"]
    async with user.client("user", own, scopes=("read", "admin")) as client:
        assert (await client.post("/api/v1/api-keys", json={"name": "x", "scopes": ["write"]})).status_code == 403
        made = (await client.post("/api/v1/api-keys", json={"name": "x"})).json()
    identity = await who_is(user, made["api_key"])
    assert identity is not None
    assert identity.scopes == {"read", "admin"}
    async with user.client("user", own, scopes=("read", "run", "write")) as client:
        for path in ("api-keys", "members"):
            assert (await client.get(f"/api/v1/{path}")).status_code == 403
        assert (await client.post("/api/v1/api-keys", json={"name": "x"})).status_code == 403


async def test_a_key_that_was_revoked_a_moment_ago_makes_no_other_one(
    user: Platform, tenant: httpx.AsyncClient
) -> None:
    """The gateway keeps an identity for two seconds, and a request may take longer."""
    own = (await tenant.get("/api/v1/tenant")).json()["id"]
    stolen, weaker = [(await tenant.post("/api/v1/api-keys", json={"name": "x"})).json()["id"] for _ in range(2)]
    async with user.database("user").begin() as tx:
        await tx.sql("UPDATE api_key SET scopes = '{admin}' WHERE id = $1::text::uuid", weaker)
    assert (await tenant.delete(f"/api/v1/api-keys/{stolen}")).status_code == 204
    everything = frozenset(("read", "run", "write", "admin"))
    answers = []
    for key in (stolen, weaker):
        known = Identity(f"api_key:{key}", own, everything, key)
        async with httpx.AsyncClient(base_url=user.url("user"), trust_env=False) as client:
            headers = {IDENTITY_HEADER: keys.identity_token(known)}
            answers.append(await client.post("/api/v1/api-keys", json={"name": "heir"}, headers=headers))
    assert [answer.status_code for answer in answers] == [401, 201]
    identity = await who_is(user, answers[1].json()["api_key"])
    assert identity is not None
    assert identity.scopes == {"admin"}
    assert "heir" in [key["name"] for key in (await tenant.get("/api/v1/api-keys")).json()["items"]]


async def test_a_members_key_follows_the_role_and_goes_with_the_member(
    user: Platform, tenant: httpx.AsyncClient
) -> None:
    member = (await tenant.post("/api/v1/members", json={"email": "v@acme.example", "role": "operator"})).json()["id"]
    key = {"name": "laptop", "member_id": member}
    assert (await tenant.post("/api/v1/api-keys", json={**key, "scopes": ["admin"]})).status_code == 403
    made = (await tenant.post("/api/v1/api-keys", json=key)).json()
    tenant_id = (await tenant.get("/api/v1/tenant")).json()["id"]
    may = frozenset(("read", "run"))
    assert await who_is(user, made["api_key"]) == Identity(f"member:{member}", tenant_id, may, made["id"])
    assert (await tenant.patch(f"/api/v1/members/{member}", json={"role": "viewer"})).json()["role"] == "viewer"
    identity = await who_is(user, made["api_key"])
    assert identity is not None
    assert identity.scopes == {"read"}
    assert (await tenant.delete(f"/api/v1/members/{member}")).status_code == 204
    assert await who_is(user, made["api_key"]) is None


async def test_a_tenant_has_so_many_owners_even_if_two_come_at_once(tenant: httpx.AsyncClient) -> None:
    """Each address gets the tenant's e-mails, unasked."""

    async def add(role: str) -> httpx.Response:
        return await tenant.post("/api/v1/members", json={"email": "o@acme.example", "role": role})

    answers = await asyncio.gather(*(add("owner") for _ in range(MAX_OWNERS + 2)))
    assert {answer.status_code for answer in answers} == {201, 409}
    owners = [one for one in (await tenant.get("/api/v1/members?limit=200")).json()["items"] if one["role"] == "owner"]
    assert len(owners) == MAX_OWNERS
    admin = (await add("admin")).json()["id"]
    assert (await tenant.patch(f"/api/v1/members/{admin}", json={"role": "owner"})).status_code == 409
    path = f"/api/v1/members/{owners[0]['id']}"
    assert (await tenant.patch(path, json={"role": "owner"})).status_code == 200
    assert (await tenant.patch(path, json={"role": "viewer"})).status_code == 200
    assert (await tenant.patch(f"/api/v1/members/{admin}", json={"role": "owner"})).status_code == 200


async def test_the_last_owner_cannot_leave_even_if_two_go_at_once(tenant: httpx.AsyncClient) -> None:
    async def add() -> str:
        answer = await tenant.post("/api/v1/members", json={"email": "o@acme.example", "role": "owner"})
        id_: str = answer.json()["id"]
        return id_

    first = await add()
    assert (await tenant.delete(f"/api/v1/members/{first}")).status_code == 409
    assert (await tenant.patch(f"/api/v1/members/{first}", json={"role": "admin"})).status_code == 409
    assert (await tenant.post(f"/api/v1/members/{first}/erase")).status_code == 409
    owners = [first, *[await add() for _ in range(4)]]
    answers = await asyncio.gather(*(tenant.delete(f"/api/v1/members/{owner}") for owner in owners))
    assert sorted(answer.status_code for answer in answers) == [204] * 4 + [409]
    assert len((await tenant.get("/api/v1/members")).json()["items"]) == 1


async def test_an_erased_person_is_gone_from_table_key_and_answers(user: Platform, tenant: httpx.AsyncClient) -> None:
    body = {"email": "erika@acme.example", "role": "viewer", "name": "Erika Öztürk 王"}
    member = (await tenant.post("/api/v1/members", json=body)).json()
    assert (member["email"], member["name"]) == (body["email"], body["name"])
    id_ = member["id"]

    async def stored() -> str:
        async with user.database("user").begin() as tx:
            rows = await tx.sql(
                "SELECT row_to_json(m)::text FROM member m WHERE id = $1::text::uuid UNION ALL "
                "SELECT convert_from(body, 'UTF8') FROM outbox UNION ALL "
                "SELECT wrapped::text FROM subject_key WHERE subject_id = $1 AND wrapped IS NOT NULL",
                id_,
            )
        return "\n".join(text for (text,) in rows)

    before = await stored()
    assert "erika@" not in before
    assert "Erika" not in before
    # A member may be removed first and erased later.
    assert (await tenant.delete(f"/api/v1/members/{id_}")).status_code == 204
    assert (await tenant.post(f"/api/v1/members/{id_}/erase")).status_code == 204
    async with user.database("user").begin() as tx:
        [(wrapped,)] = await tx.sql("SELECT wrapped FROM subject_key WHERE subject_id = $1", id_)
    assert wrapped is None
    tenant_id = (await tenant.get("/api/v1/tenant")).json()["id"]
    facts = [fact for headers, fact in await user.outbox("user", "platform.events") if "subject_id" in fact]
    assert {"tenant_id": tenant_id, "subject_id": id_} in facts
    assert (await tenant.post(f"/api/v1/members/{uuid4()}/erase")).status_code == 404


async def test_a_person_of_a_channel_is_erased_and_a_member_by_that_way_is_gone_too(
    user: Platform, tenant: httpx.AsyncClient
) -> None:
    member = (await tenant.post("/api/v1/members", json={"email": "m@acme.example", "role": "viewer"})).json()["id"]
    subject = str(uuid4())
    for id_ in (subject, member):
        assert (await tenant.post(f"/api/v1/subjects/{id_}/erase")).status_code == 204
    facts = [fact["subject_id"] for _, fact in await user.outbox("user", "platform.events") if "subject_id" in fact]
    assert facts[-2:] == [subject, member]
    answer = await tenant.get("/api/v1/members")
    assert (answer.status_code, answer.json()["items"]) == (200, [])


async def test_erased_persons_of_a_tenant_and_day_are_bounded(user: Platform, tenant: httpx.AsyncClient) -> None:
    tenant_id = (await tenant.get("/api/v1/tenant")).json()["id"]

    async def erased(count: int, ago: str) -> None:
        async with user.database("user").begin() as tx:
            await tx.sql(
                """
                INSERT INTO subject_key (tenant_id, subject_id, destroyed_at)
                SELECT $1, $3::text || n, now() - $3::text::interval FROM generate_series(1, $2) AS n
                """,
                tenant_id,
                count,
                ago,
            )

    await erased(MAX_ERASED_A_DAY, "25 hours")
    await erased(MAX_ERASED_A_DAY - 1, "1 hour")
    assert (await tenant.post("/api/v1/subjects/somebody/erase")).status_code == 204
    answer = await tenant.post("/api/v1/subjects/invented/erase")
    assert (answer.status_code, "within a day" in answer.json()["detail"]) == (409, True)
    # A repeat adds nothing.
    assert (await tenant.post("/api/v1/subjects/somebody/erase")).status_code == 204
    async with user.database("user").begin() as tx:
        assert not await tx.sql("SELECT FROM subject_key WHERE subject_id = 'invented'")


async def test_what_another_tenant_has_is_not_there(
    user: Platform, operator: httpx.AsyncClient, tenant: httpx.AsyncClient
) -> None:
    member = (await tenant.post("/api/v1/members", json={"email": "m@acme.example", "role": "viewer"})).json()["id"]
    key = (await tenant.post("/api/v1/api-keys", json={"name": "x"})).json()["id"]
    other = (await operator.post("/api/v1/tenants", json={"name": "Other"})).json()["id"]
    async with user.client("user", other) as client:
        assert (await client.get("/api/v1/members")).json()["items"] == []
        assert key not in (await client.get("/api/v1/api-keys")).text
        assert (await client.delete(f"/api/v1/api-keys/{key}")).status_code == 404
        assert (await client.patch(f"/api/v1/members/{member}", json={"role": "admin"})).status_code == 404
        assert (await client.delete(f"/api/v1/members/{member}")).status_code == 404
        assert (await client.post(f"/api/v1/members/{member}/erase")).status_code == 404
        body = {"name": "x", "member_id": member}
        assert fields(await client.post("/api/v1/api-keys", json=body)) == ["member_id"]
    # A statement without a tenant filter still sees only the tenant's own rows.
    engine = create_engine(role_url(user.database_url, "user", "request", PASSWORDS.request), pool_size=1)
    async with engine.begin() as connection:
        await connection.exec_driver_sql(f"SELECT set_config('claw.tenant', '{other}', true)")
        for table in ("tenant", "member", "api_key"):
            rows = await connection.exec_driver_sql(f"SELECT DISTINCT tenant_id FROM {table}")
            assert {tenant_id for (tenant_id,) in rows} <= {other}
    await engine.dispose()


async def test_every_change_is_audited_with_its_actor_and_without_names(
    user: Platform, tenant: httpx.AsyncClient
) -> None:
    member = (await tenant.post("/api/v1/members", json={"email": "m@acme.example", "role": "viewer"})).json()["id"]
    key = (await tenant.post("/api/v1/api-keys", json={"name": "k", "scopes": ["read"]})).json()["id"]
    await tenant.patch(f"/api/v1/members/{member}", json={"role": "admin"})
    await tenant.delete(f"/api/v1/api-keys/{key}")
    await tenant.post(f"/api/v1/members/{member}/erase")
    tenant_id = (await tenant.get("/api/v1/tenant")).json()["id"]
    acts = [act for _, act in await user.outbox("user", "audit.logs") if act["tenant_id"] == tenant_id]
    assert [(act["actor"], act["action"]) for act in acts] == [
        ("operator", "tenant.create"),
        ("operator", "api_key.create"),
        ("api_key:test", "member.add"),
        ("api_key:test", "api_key.create"),
        ("api_key:test", "member.change_role"),
        ("api_key:test", "api_key.revoke"),
        ("api_key:test", "subject.erase"),
    ]
    assert [act["object_id"] for act in acts[2:]] == [member, key, member, key, member]
    assert "m@acme" not in str(acts)


async def test_the_directory_tells_the_owners_addresses(
    user: Platform, operator: httpx.AsyncClient, tenant: httpx.AsyncClient
) -> None:
    tenant_id = (await tenant.get("/api/v1/tenant")).json()["id"]
    for email, role in (("o@acme.example", "owner"), ("a@acme.example", "admin"), ("p@acme.example", "owner")):
        await tenant.post("/api/v1/members", json={"email": email, "role": role})
    directory = user_pb2_grpc.DirectoryStub(user.channels("notification").to(user.grpc("user"), "user"))
    reply = await directory.Owners(user_pb2.OwnersRequest(), metadata=rpc.tenant_metadata(tenant_id))
    assert list(reply.emails) == ["o@acme.example", "p@acme.example"]
    nobody = await directory.Owners(user_pb2.OwnersRequest(), metadata=rpc.tenant_metadata(str(uuid4())))
    assert list(nobody.emails) == []
    with pytest.raises(Forbidden, match="must be called for a tenant"):
        await directory.Owners(user_pb2.OwnersRequest())


async def test_what_a_key_may_do_is_told_as_long_as_it_is_one(user: Platform, tenant: httpx.AsyncClient) -> None:
    tenant_id = (await tenant.get("/api/v1/tenant")).json()["id"]
    keys = user_pb2_grpc.KeysStub(user.channels("ws_gateway").to(user.grpc("user"), "user"))
    gateway = identities("ws_gateway")
    tokens: dict[str, str] = {}

    async def scopes(key_id: str, of: str = tenant_id, token: str | None = None) -> list[str]:
        request = user_pb2.ScopesRequest(key_id=key_id, token=tokens[key_id] if token is None else token)
        reply = await keys.Scopes(request, metadata=rpc.tenant_metadata(of))
        if reply.token:
            tokens[key_id] = reply.token
            assert gateway.verify(reply.token, "GET", "/ws").scopes == set(reply.scopes)
        return list(reply.scopes)

    async def made(**fields: Any) -> str:
        made = (await tenant.post("/api/v1/api-keys", json={"name": "k", **fields})).json()
        headers = {"authorization": f"Bearer {made['api_key']}", "x-claw-service": "ws_gateway"}
        tokens[made["id"]] = (await tenant.get("/internal/auth", headers=headers)).headers[IDENTITY_HEADER]
        return str(made["id"])

    member = (await tenant.post("/api/v1/members", json={"email": "k@acme.example", "role": "operator"})).json()["id"]
    revoked, expiring, theirs = await made(scopes=["read"]), await made(), await made(member_id=member)
    assert await scopes(revoked) == ["read"]
    with pytest.raises(InvalidMessage, match="token"):
        await scopes(revoked, of=str(uuid4()))
    with pytest.raises(InvalidMessage, match="token"):
        await scopes(expiring, token=tokens[revoked])
    with pytest.raises(InvalidMessage, match="Not enough segments"):
        await scopes(expiring, token="")
    await tenant.delete(f"/api/v1/api-keys/{revoked}")
    assert await scopes(revoked) == []
    assert await scopes(expiring) == ["admin", "read", "run", "write"]
    async with user.database("user").begin() as tx:
        await tx.sql("UPDATE api_key SET expires_at = now() WHERE id = $1::text::uuid", expiring)
    assert await scopes(expiring) == []
    assert await scopes(theirs) == ["read", "run"]
    await tenant.patch(f"/api/v1/members/{member}", json={"role": "viewer"})
    assert await scopes(theirs) == ["read"]
