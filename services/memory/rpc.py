"""The gRPC service of memory: retrieval for agents and tools, and the memories of the person who speaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from infra.errors import InvalidMessage, NotFound
from infra.postgres.tx import Database, Tx
from infra.security.audit import audit
from infra.security.subjects import Erased
from infra.service.service import Runtime
from infra.web import rpc
from protos.memory.v1 import memory_pb2, memory_pb2_grpc
from services.memory import rights
from services.memory.adapters import memories, retrieval
from services.memory.extraction import MAX_TEXT
from services.memory.handlers import enqueue_memory
from services.memory.memories import Memories, id_of
from services.memory.memories import Memory as Remembered
from services.memory.retrieval import HYBRID, Query, Retrieval, Scored

# The most memories of one answer: the answer is shorter than a tool's result may be for a model.
PAGE = 50


class Memory(memory_pb2_grpc.MemoryServicer):
    def __init__(self, retrieval: Retrieval, memories: Memories, database: Database) -> None:
        self._retrieval = retrieval
        self._memories = memories
        self._database = database

    async def Retrieve(self, request: memory_pb2.RetrieveRequest, context: Any) -> memory_pb2.RetrieveReply:
        query = Query(
            request.query,
            limit=request.limit or None,
            min_similarity=request.min_similarity if request.HasField("min_similarity") else None,
            types=request.types,
            session_key=request.session_key or None,
            mode=request.mode or HYBRID,
        )
        caller = rights.of_agent(rpc.tenant(), request.agent_id, request.subject_id)
        answer = await self._retrieval.search(caller, query, context.time_remaining())
        return memory_pb2.RetrieveReply(
            passages=[_passage(each) for each in answer.items], degraded=answer.degraded, reranked=answer.reranked
        )

    async def ListMemories(self, request: memory_pb2.ListMemoriesRequest, context: Any) -> memory_pb2.ListMemoriesReply:
        person = _person(request.subject_id)
        async with self._database.begin(tenant_id=rpc.tenant()) as tx:
            last = await self._own(tx, person, request.before, lock=False) if request.before else None
            before = (last.said_at, last.id) if last else None
            found = await self._memories.newest(tx, PAGE + 1, before, [person], "user", person)
        return memory_pb2.ListMemoriesReply(memories=[_shown(each) for each in found[:PAGE]], more=len(found) > PAGE)

    async def CorrectMemory(self, request: memory_pb2.CorrectMemoryRequest, context: Any) -> memory_pb2.PersonalMemory:
        person, text = _person(request.subject_id), request.text.strip()
        if not 1 <= len(text) <= MAX_TEXT:
            raise InvalidMessage("text", f"must have 1 to {MAX_TEXT} characters")
        async with self._database.begin(tenant_id=rpc.tenant()) as tx:
            memory = await self._own(tx, person, request.memory_id)
            changed = memory._replace(text=text)
            try:
                await self._memories.change(tx, changed, person)
            except Erased:
                raise NotFound(f"memory {memory.id}: does not exist") from None
            enqueue_memory(tx, memory.id)
            audit(tx, person, "memory.change", "memory", str(memory.id))
        return _shown(changed)

    async def ForgetMemory(self, request: memory_pb2.ForgetMemoryRequest, context: Any) -> memory_pb2.ForgetMemoryReply:
        person = _person(request.subject_id)
        async with self._database.begin(tenant_id=rpc.tenant()) as tx:
            memory = await self._own(tx, person, request.memory_id)
            await self._memories.delete(tx, memory.id, person)
            audit(tx, person, "memory.delete", "memory", str(memory.id))
        return memory_pb2.ForgetMemoryReply()

    async def _own(self, tx: Tx, person: str, memory_id: str, *, lock: bool = True) -> Remembered:
        """The memory of the person. Raises NotFound, also for one of another person or of the tenant."""
        memory = await self._memories.get(tx, id_of(memory_id), [person], lock=lock)
        if (memory.scope, memory.scope_id) != ("user", person):
            raise NotFound(f"memory {memory_id}: does not exist")
        return memory


def servicer(runtime: Runtime) -> tuple[Callable[[Any, Any], None], Memory]:
    served = Memory(retrieval(runtime), memories(runtime), runtime.request)
    return memory_pb2_grpc.add_MemoryServicer_to_server, served


def _person(subject_id: str) -> str:
    if not subject_id:
        raise InvalidMessage("subject_id", "missing: must name the person")
    return subject_id


def _shown(memory: Remembered) -> memory_pb2.PersonalMemory:
    states = memory_pb2.PersonalMemory
    state = states.STATE_ARCHIVED if memory.archived_at else states.STATE_IN_FORCE
    shown = memory_pb2.PersonalMemory(
        id=str(memory.id),
        text=memory.text,
        state=states.STATE_REPLACED if memory.replaced_by else state,
        run_id=str(memory.run_id or ""),
        channel_id=str(memory.channel_id or ""),
        speaker=memory.speaker,
    )
    shown.said_at.FromDatetime(memory.said_at)
    return shown


def _passage(scored: Scored) -> memory_pb2.Passage:
    passage = scored.passage
    source = memory_pb2.Source(
        document_id=str(passage.document_id or ""), name=passage.name, section=passage.section, page=passage.page
    )
    return memory_pb2.Passage(
        text=passage.text,
        score=scored.score,
        source=source,
        dense=scored.dense,
        keyword=scored.keyword,
        match=scored.match,
    )
