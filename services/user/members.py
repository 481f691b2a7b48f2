"""Members: people of a tenant, with a role. Each member's address and name are sealed with the member's own key."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Path, Request, Response

from infra.clock import uuid7
from infra.errors import Conflict, NotFound
from infra.postgres.tx import Tx
from infra.security import subjects as subject_keys
from infra.security.audit import audit
from infra.security.subjects import SubjectKeys
from infra.service.api import Admin, Paging, id_cursor, page
from infra.service.idempotency import once
from infra.service.service import Runtime
from protos.catalog import PLATFORM_EVENTS
from protos.messages.user import SubjectErased
from services.user import domain
from services.user.domain import Role
from services.user.fields import Body, Email, Name, View

MAX_OWNERS = 20
"""Of a tenant. Each gets the e-mails to it, and addresses are not confirmed."""
MAX_ERASED_A_DAY = 5_000
"""Of a tenant. Each service keeps a row of each, also of one that it has never met."""
_COLUMNS = "id, role, email, name, created_at"
_SubjectId = Annotated[str, Path(pattern=r"^[!-~]{1,200}$")]


class NewMember(Body):
    email: Email
    role: Role
    name: Name | None = None


class NewRole(Body):
    role: Role


class Member(View):
    id: UUID
    email: str
    role: Role
    name: str | None
    created_at: datetime


def router(runtime: Runtime) -> APIRouter:
    subjects = SubjectKeys(runtime.cipher)
    routes = APIRouter(tags=["members"])

    @routes.post("/api/v1/members", status_code=201, response_model=Member)
    async def add_member(body: NewMember, who: Admin, request: Request) -> Response:
        async def work(tx: Tx) -> tuple[int, Member]:
            return 201, await add(tx, subjects, who.tenant_id, body, who.actor)

        return await once(request, runtime, who, work)

    @routes.get("/api/v1/members")
    async def list_members(who: Admin, paging: Paging) -> dict[str, Any]:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            rows = await tx.sql(
                f"""
                SELECT {_COLUMNS} FROM member WHERE tenant_id = $1 AND ($2::uuid IS NULL OR id > $2)
                ORDER BY id LIMIT $3
                """,
                who.tenant_id,
                id_cursor(paging),
                paging.limit + 1,
            )
            found = [await _opened(tx, subjects, who.tenant_id, row) for row in rows]
        return page(found, paging, lambda member: str(member.id))

    @routes.patch("/api/v1/members/{id}")
    async def change_role(id: UUID, body: NewRole, who: Admin) -> Member:
        """Changes the member's role. The scopes of the member's API keys follow within seconds."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await _check_owners(tx, who.tenant_id, str(id), body.role)
            rows = await tx.sql(
                f"UPDATE member SET role = $3 WHERE tenant_id = $1 AND id = $2 RETURNING {_COLUMNS}",
                who.tenant_id,
                id,
                body.role,
            )
            if not rows:
                raise _none(id)
            audit(tx, who.actor, "member.change_role", "member", str(id), role=body.role)
            return await _opened(tx, subjects, who.tenant_id, rows[0])

    @routes.delete("/api/v1/members/{id}", status_code=204)
    async def remove_member(id: UUID, who: Admin) -> None:
        """Removes the member and the member's API keys."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            if not await _delete(tx, who.tenant_id, str(id)):
                raise _none(id)
            audit(tx, who.actor, "member.remove", "member", str(id))

    @routes.post("/api/v1/members/{id}/erase", status_code=204)
    async def erase_member(id: UUID, who: Admin) -> None:
        """Removes the member and makes all stored data of the person unreadable forever. Also works after a removal."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            if not await tx.sql(
                "SELECT 1 FROM subject_key WHERE tenant_id = $1 AND subject_id = $2", who.tenant_id, str(id)
            ):
                raise _none(id)
            await _erase(tx, who.tenant_id, str(id), who.actor)

    @routes.post("/api/v1/subjects/{id}/erase", status_code=204)
    async def erase_subject(id: _SubjectId, who: Admin) -> None:
        """Makes all stored data of a person from a channel unreadable forever. `id` is the person's subject_id."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await _erase(tx, who.tenant_id, id, who.actor)

    return routes


async def add(tx: Tx, subjects: SubjectKeys, tenant_id: str, new: NewMember, actor: str) -> Member:
    """Adds a member and the member's subject key. Raises Conflict for one owner more than MAX_OWNERS."""
    id_ = uuid7()
    if new.role == "owner":
        await _check_owners(tx, tenant_id, str(id_), "owner")
    key = await subjects.key(tx, tenant_id, str(id_))
    [row] = await tx.sql(
        f"INSERT INTO member (id, tenant_id, role, email, name) VALUES ($1, $2, $3, $4, $5) RETURNING {_COLUMNS}",
        id_,
        tenant_id,
        new.role,
        key.seal(new.email, tenant_id, str(id_), "email"),
        key.seal(new.name, tenant_id, str(id_), "name") if new.name else None,
    )
    audit(tx, actor, "member.add", "member", str(id_), role=new.role)
    return await _opened(tx, subjects, tenant_id, row)


async def owners_emails(tx: Tx, subjects: SubjectKeys, tenant_id: str) -> list[str]:
    """The e-mail addresses of a tenant's owners."""
    rows = await tx.sql(f"SELECT {_COLUMNS} FROM member WHERE tenant_id = $1 AND role = 'owner' ORDER BY id", tenant_id)
    return [(await _opened(tx, subjects, tenant_id, row)).email for row in rows]


async def _opened(tx: Tx, subjects: SubjectKeys, tenant_id: str, row: tuple[Any, ...]) -> Member:
    id_, role, email, name, created_at = row
    key = await subjects.key(tx, tenant_id, str(id_))
    return Member(
        id=id_,
        email=key.open(email, tenant_id, str(id_), "email"),
        role=role,
        name=key.open(name, tenant_id, str(id_), "name") if name else None,
        created_at=created_at,
    )


async def _check_owners(tx: Tx, tenant_id: str, member_id: str, role: Role | None) -> None:
    """Raises Conflict if the tenant would lose its last owner, or have more than MAX_OWNERS."""
    # Locks the tenant's row: without the lock, two owners could remove each other at the same time.
    await tx.sql("SELECT FROM tenant WHERE tenant_id = $1 FOR UPDATE", tenant_id)
    rows = await tx.sql("SELECT id FROM member WHERE tenant_id = $1 AND role = 'owner'", tenant_id)
    owners = [str(id_) for (id_,) in rows]
    if role == "owner" and member_id not in owners and len(owners) >= MAX_OWNERS:
        raise Conflict(f"a tenant may have {MAX_OWNERS} owners; change the role of one first")
    if not domain.may_become(owners, member_id, role):
        raise Conflict(f"member {member_id}: is the last owner; make another member an owner first")


async def _delete(tx: Tx, tenant_id: str, member_id: str) -> bool:
    """Returns False if the member does not exist. Raises Conflict for the last owner."""
    await _check_owners(tx, tenant_id, member_id, None)
    return bool(
        await tx.sql("DELETE FROM member WHERE tenant_id = $1 AND id::text = $2 RETURNING id", tenant_id, member_id)
    )


async def _erase(tx: Tx, tenant_id: str, subject_id: str, actor: str) -> None:
    """Raises Conflict for one more new person than MAX_ERASED_A_DAY."""
    [(is_new, count)] = await tx.sql(
        """
        SELECT
            NOT EXISTS (
                SELECT FROM subject_key WHERE tenant_id = $1 AND subject_id = $2 AND destroyed_at IS NOT NULL
            ),
            (SELECT count(*) FROM subject_key WHERE tenant_id = $1 AND destroyed_at > now() - interval '1 day')
        """,
        tenant_id,
        subject_id,
    )
    if is_new and count >= MAX_ERASED_A_DAY:
        raise Conflict(f"a tenant may erase {MAX_ERASED_A_DAY} persons within a day; try again tomorrow")
    await _delete(tx, tenant_id, subject_id)
    await subject_keys.destroy(tx, tenant_id, subject_id)
    tx.publish(PLATFORM_EVENTS, SubjectErased(tenant_id=tenant_id, subject_id=subject_id), key=tenant_id)
    audit(tx, actor, "subject.erase", "subject", subject_id)


def _none(member_id: UUID) -> NotFound:
    return NotFound(f"member {member_id}: does not exist")
