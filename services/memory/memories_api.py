"""The HTTP routes of memories: people see, correct and delete theirs; tenants see and add all."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal
from uuid import UUID

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict
from starlette.responses import Response

from infra.clock import utcnow, uuid7
from infra.errors import Forbidden, InvalidMessage
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.security.auth import Identity
from infra.security.reads import record_reads
from infra.security.subjects import Erased
from infra.service.api import Paging, Reader, page
from infra.service.idempotency import once
from infra.service.service import Runtime
from infra.web.times import Time
from services.memory import adapters
from services.memory.lanes import enqueue_memory
from services.memory.memories.events import Scope
from services.memory.memories.extraction import MAX_TEXT, Kind, topic_of
from services.memory.memories.keeping import MAX_PARTS, New
from services.memory.memories.store import Memory, id_of

_EXAMPLE: JsonDict = {"text": "I am allergic to nuts.", "scope": "user", "importance": 9, "confidence": 1.0}


class MemoryOrigin(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    run_id: UUID | None = None
    """The run in which it was said."""
    message_id: str | None = Field(default=None, max_length=200)


class MemorySource(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    run_id: UUID | None
    """The run in which it was said."""
    message_id: str | None
    channel_id: UUID | None
    """The channel in which it was said; null if it came by the API."""
    learned_by: str | None
    """rules, or the model that found it in the person's words; null if a client wrote it."""


class NewMemory(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, json_schema_extra={"examples": [_EXAMPLE]})

    text: str = Field(min_length=1, max_length=MAX_TEXT)
    scope: Scope = "user"
    scope_id: str | None = Field(default=None, min_length=1, max_length=200)
    """The agent's id, the person's subject id, or the session key. Missing for the scope tenant; for the scope user the
    caller by default."""
    kind: Kind = "fact"
    importance: int = Field(default=5, ge=1, le=10)
    confidence: float = Field(default=1.0, ge=0, le=1)
    source: MemoryOrigin = MemoryOrigin()
    expires_at: Time | None = None
    parts: list[UUID] = Field(default=[], max_length=MAX_PARTS)
    """Memories of the same scope that become this one: it is as important as the most important of them and as certain
    as the least certain. Agents do not get them any more. `…/split` undoes it."""


class MemoryChange(BaseModel):
    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, json_schema_extra={"examples": [{"text": "I eat nuts again."}]}
    )

    text: str | None = Field(default=None, min_length=1, max_length=MAX_TEXT)
    importance: int | None = Field(default=None, ge=1, le=10)
    confidence: float | None = Field(default=None, ge=0, le=1)
    expires_at: Time | None = None
    """null removes the end."""
    archived: bool | None = None
    """true: agents do not get the memory any more, until the person says it again. false: they get it again, also if a
    newer memory has replaced it."""


class MemoryView(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    id: UUID
    text: str
    scope: Scope
    scope_id: str
    kind: Kind
    importance: int
    """From 1 to 10."""
    confidence: float
    """From 0 to 1."""
    source: MemorySource
    speaker: str
    """person, if it was taken from a conversation; otherwise the client that wrote it."""
    created_at: datetime
    """The time at which it was said."""
    expires_at: datetime | None
    uses: int
    """How often it was said again or given to an agent."""
    replaced_by: UUID | None
    """The newer memory that contradicts it; agents do not get this one any more."""
    archived_at: datetime | None
    parts: list[UUID]
    """The memories that became this one."""


class MemoryList(BaseModel):
    items: list[MemoryView]
    next: str | None


class MemoryParts(BaseModel):
    items: list[MemoryView]


def router(runtime: Runtime) -> APIRouter:
    router = APIRouter()
    memories, keeping = adapters.memories(runtime), adapters.keeping(runtime)

    @router.post("/api/v1/memories", status_code=201, response_model=MemoryView)
    async def add(body: NewMemory, who: Reader, request: Request) -> Response:
        """Adds a memory. The same text in the same scope is one memory: the answer shows the one that exists. For
        oneself the scope read is enough; for others and for the tenant, write is needed. With `parts` the new memory
        stands for several that exist."""
        scope_id = _scope_id(body, who)
        if not body.text.strip():
            raise InvalidMessage("text", "must not be empty")
        if (body.scope, scope_id) != ("user", who.actor) and "write" not in who.scopes:
            raise Forbidden("the scope write is missing")
        if body.expires_at and body.expires_at <= utcnow():
            raise InvalidMessage("expires_at", "must be in the future")
        if body.expires_at and body.parts:
            raise InvalidMessage("expires_at", "must be missing if there are parts")

        async def work(tx: Tx) -> tuple[int, BaseModel]:
            new = New(
                id=uuid7(),
                scope=body.scope,
                scope_id=scope_id,
                subject_id=scope_id if body.scope == "user" else "",
                text=body.text.strip(),
                kind=body.kind,
                # A fact on one topic replaces another one for good, so one that ends must not.
                topic=topic_of(body.text) if body.scope == "user" and body.expires_at is None else None,
                importance=body.importance,
                confidence=body.confidence,
                speaker=who.actor,
                at=utcnow(),
                run_id=body.source.run_id,
                message_id=body.source.message_id,
                expires_at=body.expires_at,
            )
            try:
                if body.parts:
                    memory_id, is_new = await keeping.consolidate(tx, new, body.parts), True
                else:
                    memory_id, is_new = await keeping.learn(tx, new)
            except Erased:
                raise InvalidMessage("scope_id", "this person was erased") from None
            if is_new:
                enqueue_memory(tx, memory_id)
            audit(tx, who.actor, "memory.add", "memory", str(memory_id), scope=body.scope)
            return 201, _view(await memories.get(tx, memory_id, None))

        return await once(request, runtime, who, work)

    @router.get("/api/v1/memories")
    async def list_memories(
        who: Reader,
        paging: Paging,
        scope: Literal["tenant", "agent", "user", "session"] | None = None,
        scope_id: str | None = None,
    ) -> MemoryList:
        """The memories that the caller may see, newest first: its own and the tenant's; with the scope admin, all."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            found = await memories.newest(tx, paging.limit + 1, paging.after_time(UUID), _names(who), scope, scope_id)
            await record(tx, who, found[: paging.limit])
        listed = page(found, paging, key=lambda memory: f"{memory.said_at.isoformat()} {memory.id}")
        return MemoryList(items=[_view(memory) for memory in listed["items"]], next=listed["next"])

    @router.get("/api/v1/memories/{memory_id}")
    async def show(memory_id: str, who: Reader) -> MemoryView:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            memory = await memories.get(tx, id_of(memory_id), _names(who))
            await record(tx, who, [memory])
        return _view(memory)

    @router.patch("/api/v1/memories/{memory_id}")
    async def change(memory_id: str, body: MemoryChange, who: Reader) -> MemoryView:
        """Corrects a memory. 409 if another memory says the same."""
        if body.text is not None and not body.text.strip():
            raise InvalidMessage("text", "must not be empty")
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            memory = await memories.locked(tx, id_of(memory_id), _names(who))
            _may_change(memory, who)
            changed = memory._replace(
                text=memory.text if body.text is None else body.text.strip(),
                importance=memory.importance if body.importance is None else body.importance,
                confidence=memory.confidence if body.confidence is None else body.confidence,
                expires_at=body.expires_at if "expires_at" in body.model_fields_set else memory.expires_at,
            )
            if body.archived is False:
                await keeping.restore(tx, memory, who.actor)
                changed = changed._replace(archived_at=None, replaced_by=None)
            elif body.archived:
                now = utcnow()
                await keeping.archive(tx, memory.id, who.actor, now)
                changed = changed._replace(archived_at=now)
            if body.model_fields_set - {"archived"}:
                changed = await keeping.change(tx, changed, who.actor)
                enqueue_memory(tx, memory.id)
            audit(tx, who.actor, "memory.change", "memory", str(memory.id))
            return _view(changed)

    @router.delete("/api/v1/memories/{memory_id}", status_code=204)
    async def delete(memory_id: str, who: Reader) -> None:
        """Deletes a memory and the older ones that it replaced or was made of. If it is a part of another memory, that
        one is split first."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            memory = await memories.locked(tx, id_of(memory_id), _names(who))
            _may_change(memory, who)
            await keeping.delete(tx, memory, who.actor)
            audit(tx, who.actor, "memory.delete", "memory", str(memory.id))

    @router.post("/api/v1/memories/{memory_id}/split")
    async def split(memory_id: str, who: Reader) -> MemoryParts:
        """Undoes that a memory was made of several others: they are in force again, and it is gone. 409 if it was not
        made of others."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            memory = await memories.locked(tx, id_of(memory_id), _names(who))
            _may_change(memory, who)
            await keeping.divide(tx, memory, who.actor)
            audit(tx, who.actor, "memory.split", "memory", str(memory.id))
            return MemoryParts(items=[_view(await memories.get(tx, id_, None)) for id_ in memory.parts])

    return router


def _scope_id(body: NewMemory, who: Identity) -> str:
    match body.scope:
        case "tenant":
            if body.scope_id:
                raise InvalidMessage("scope_id", "must be missing for the scope tenant")
            return ""
        case "user":
            return body.scope_id or who.actor
        case _:
            if not body.scope_id:
                raise InvalidMessage("scope_id", f"missing: must name the {body.scope}")
            return body.scope_id


def _names(who: Identity) -> list[str] | None:
    """The subject id of the caller; None for an administrator, who sees all memories of the tenant."""
    return None if "admin" in who.scopes else [who.actor]


async def record(tx: Tx, who: Identity, shown: Sequence[Memory]) -> None:
    """Records that the client reads the memories, except those of itself."""
    others = [str(memory.id) for memory in shown if (memory.scope, memory.scope_id) != ("user", who.actor)]
    await record_reads(tx, who, "memory", others)


def _may_change(memory: Memory, who: Identity) -> None:
    if (memory.scope, memory.scope_id) != ("user", who.actor) and "write" not in who.scopes:
        raise Forbidden("the scope write is missing")


def _view(memory: Memory) -> MemoryView:
    return MemoryView(
        id=memory.id,
        text=memory.text,
        scope=memory.scope,
        scope_id=memory.scope_id,
        kind=memory.kind,
        importance=memory.importance,
        confidence=round(memory.confidence, 4),
        source=MemorySource(
            run_id=memory.run_id,
            message_id=memory.message_id,
            channel_id=memory.channel_id,
            learned_by=memory.learned_by or None,
        ),
        speaker=memory.speaker,
        created_at=memory.said_at,
        expires_at=memory.expires_at,
        uses=memory.uses,
        replaced_by=memory.replaced_by,
        archived_at=memory.archived_at,
        parts=list(memory.parts),
    )
