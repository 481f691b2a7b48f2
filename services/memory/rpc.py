"""The gRPC service of memory: retrieval for agents and tools, and the memories of the person who speaks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC
from typing import Any, cast, get_args
from uuid import UUID

from infra.errors import InvalidMessage, NotFound
from infra.postgres.database import Database
from infra.postgres.inbox import mark_handled
from infra.postgres.tx import Tx, derived_id
from infra.security.audit import audit
from infra.security.subjects import Erased
from infra.service.service import Runtime
from infra.stores import filetypes
from infra.web import rpc
from protos.memory.v1 import memory_pb2, memory_pb2_grpc
from services.memory import rights
from services.memory.adapters import keeping, learning, memories, objects, retrieval, sent_files
from services.memory.knowledge.documents import DocumentOrigin
from services.memory.knowledge.reading import FileReader
from services.memory.knowledge.sent_files import SentFiles
from services.memory.lanes import enqueue_memory
from services.memory.memories.events import MAX_IMPORTANCE
from services.memory.memories.extraction import MAX_FACTS, MAX_TEXT, Kind, is_stated, normal
from services.memory.memories.keeping import Keeping
from services.memory.memories.learning import FinishedRun, FoundFact, Learning, Merged
from services.memory.memories.store import Memories, Memory, id_of
from services.memory.metering.usage import UseSource
from services.memory.search.retrieval import HYBRID, Query, Retrieval, Scored

# The most memories of one answer: the answer is shorter than a tool's result may be for a model.
PAGE = 50
MAX_MERGES = 1
MAX_CHARACTERS = 100_000
READABLE = (filetypes.PDF, *filetypes.OFFICE, filetypes.HTML)
"""Types of files that are read for a chat."""


class MemoryRpc(memory_pb2_grpc.MemoryServicer):
    def __init__(
        self,
        retrieval: Retrieval,
        memories: Memories,
        keeping: Keeping,
        learning: Learning,
        files: FileReader,
        sent: SentFiles,
        database: Database,
    ) -> None:
        self._retrieval = retrieval
        self._memories = memories
        self._keeping = keeping
        self._learning = learning
        self._files = files
        self._sent = sent
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
        origin = UseSource(
            request.agent_id,
            request.channel_id,
            request.session_key,
            request.api_key_id,
            request.member_id,
            request.tag,
        )
        caller = rights.of_agent(rpc.tenant(), request.agent_id, request.subject_id, origin)
        if request.after:
            id_ = _uuid("after", request.after)
            await self._retrieval.wait_for(caller.tenant_id, id_, caller.names, context.time_remaining())
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
                changed = await self._keeping.change(tx, changed, person)
            except Erased:
                raise NotFound(f"memory {memory.id}: does not exist") from None
            enqueue_memory(tx, memory.id)
            audit(tx, person, "memory.change", "memory", str(memory.id))
        return _shown(changed)

    async def ForgetMemory(self, request: memory_pb2.ForgetMemoryRequest, context: Any) -> memory_pb2.ForgetMemoryReply:
        person = _person(request.subject_id)
        async with self._database.begin(tenant_id=rpc.tenant()) as tx:
            memory = await self._own(tx, person, request.memory_id)
            await self._keeping.delete(tx, memory, person)
            audit(tx, person, "memory.delete", "memory", str(memory.id))
        return memory_pb2.ForgetMemoryReply()

    async def Learn(self, request: memory_pb2.LearnRequest, context: Any) -> memory_pb2.LearnReply:
        run = FinishedRun(
            id=_uuid("run_id", request.run_id),
            subject_id=_person(request.subject_id),
            channel_id=_uuid("channel_id", request.channel_id) if request.channel_id else None,
            message_id=request.message_id or None,
            at=request.said_at.ToDatetime(UTC),
        )
        found = [_fact(f"facts[{n}]", fact) for n, fact in enumerate(request.facts)]
        merged = [_merge(f"merges[{n}]", merge) for n, merge in enumerate(request.merges)]
        if len(found) > MAX_FACTS or len(merged) > MAX_MERGES:
            raise InvalidMessage("facts", f"must be at most {MAX_FACTS}, with at most {MAX_MERGES} merges")
        async with self._database.begin(tenant_id=rpc.tenant()) as tx:
            # A repeated call would count the facts as said again.
            if not await mark_handled(await tx.connection(), "learn", [derived_id(run.id, "learn", request.model)]):
                return memory_pb2.LearnReply()
            if request.model:
                quoted = zip(found, request.facts, strict=True)
                stated = [fact for fact, asked in quoted if is_stated(asked.quote, request.said)]
                learned = await self._learning.by_model(tx, run, request.model, stated, merged)
            else:
                learned = await self._learning.by_rules(tx, run, request.said)
            for memory_id in learned:
                enqueue_memory(tx, memory_id)
        return memory_pb2.LearnReply(learned=len(learned))

    async def ReadFile(self, request: memory_pb2.ReadFileRequest, context: Any) -> memory_pb2.ReadFileReply:
        _check_attachment(request.path)
        if request.content_type not in READABLE:
            raise InvalidMessage("content_type", f"must be one of {', '.join(READABLE)}")
        if not 1 <= request.max_characters <= MAX_CHARACTERS:
            raise InvalidMessage("max_characters", f"must be from 1 to {MAX_CHARACTERS}")
        found = await self._files.read(rpc.tenant(), request.path, request.content_type, request.max_characters)
        return memory_pb2.ReadFileReply(
            text=found.text, is_cut=found.is_cut, refused=found.refused, warnings=found.warnings
        )

    async def KeepFile(self, request: memory_pb2.KeepFileRequest, context: Any) -> memory_pb2.KeepFileReply:
        _uuid("document_id", request.document_id)
        _check_attachment(request.path, _person(request.subject_id))
        origin = DocumentOrigin(
            _uuid("channel_id", request.channel_id),
            _uuid("message_id", request.message_id),
            _person(request.subject_id),
        )
        await self._sent.keep(rpc.tenant(), origin, request)
        return memory_pb2.KeepFileReply()

    async def ForgetFiles(self, request: memory_pb2.ForgetFilesRequest, context: Any) -> memory_pb2.ForgetFilesReply:
        message_id = _uuid("message_id", request.message_id)
        await self._sent.forget(rpc.tenant(), _person(request.subject_id), message_id)
        return memory_pb2.ForgetFilesReply()

    async def _own(self, tx: Tx, person: str, memory_id: str, *, lock: bool = True) -> Memory:
        """The memory of the person. Raises NotFound, also for one of another person or of the tenant."""
        read = self._memories.locked if lock else self._memories.get
        memory = await read(tx, id_of(memory_id), [person])
        if (memory.scope, memory.scope_id) != ("user", person):
            raise NotFound(f"memory {memory_id}: does not exist")
        return memory


def servicer(runtime: Runtime) -> tuple[Callable[[Any, Any], None], MemoryRpc]:
    files = FileReader(objects(runtime))
    served = MemoryRpc(
        retrieval(runtime),
        memories(runtime),
        keeping(runtime),
        learning(runtime),
        files,
        sent_files(runtime),
        runtime.request,
    )
    return memory_pb2_grpc.add_MemoryServicer_to_server, served


def _check_attachment(path: str, person: str = "") -> None:
    """Raises InvalidMessage for a file that is not of the call's tenant, or not of the person."""
    owner, *folder = path.split("/")[:3]
    if folder != ["attachments", rpc.tenant()] or owner != (person or owner):
        raise InvalidMessage("path", "must be an attachment of the tenant, and of the person")


def _person(subject_id: str) -> str:
    if not subject_id:
        raise InvalidMessage("subject_id", "missing: must name the person")
    return subject_id


def _uuid(field: str, text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise InvalidMessage(field, "must be a UUID") from None


def _fact(field: str, fact: memory_pb2.Fact) -> FoundFact:
    """Raises InvalidMessage that names the wrong field below `field`."""
    if fact.kind not in get_args(Kind):
        raise InvalidMessage(f"{field}.kind", f"must be one of {', '.join(get_args(Kind))}")
    if not 1 <= fact.importance <= MAX_IMPORTANCE:
        raise InvalidMessage(f"{field}.importance", f"must be from 1 to {MAX_IMPORTANCE}")
    # This form of the comparison also refuses NaN.
    if not 0 <= fact.confidence <= 1:
        raise InvalidMessage(f"{field}.confidence", "must be from 0 to 1")
    return FoundFact(
        text=_bounded(f"{field}.text", fact.text),
        kind=cast("Kind", fact.kind),
        topic=normal(fact.topic)[:MAX_TEXT] or None,
        importance=fact.importance,
        confidence=fact.confidence,
        message_id=fact.message_id or None,
        same_as=_uuid(f"{field}.same_as", fact.same_as) if fact.same_as else None,
        replaces=_uuid(f"{field}.replaces", fact.replaces) if fact.replaces else None,
    )


def _merge(field: str, merge: memory_pb2.Merge) -> Merged:
    parts = [_uuid(f"{field}.memory_ids[{n}]", id_) for n, id_ in enumerate(merge.memory_ids)]
    return Merged(parts, _bounded(f"{field}.text", merge.text))


def _bounded(field: str, text: str) -> str:
    """The text of a memory. Raises InvalidMessage."""
    stripped = " ".join(text.replace("\0", " ").split())
    if not 1 <= len(stripped) <= MAX_TEXT:
        raise InvalidMessage(field, f"must have 1 to {MAX_TEXT} characters")
    return stripped


def _shown(memory: Memory) -> memory_pb2.PersonalMemory:
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
        document_id=str(passage.document_id or ""),
        name=passage.name,
        section=passage.section,
        page=passage.page,
        version=passage.version,
    )
    return memory_pb2.Passage(
        text=passage.text,
        score=scored.score,
        source=source,
        dense=scored.dense,
        keyword=scored.keyword,
        match=scored.match,
    )
