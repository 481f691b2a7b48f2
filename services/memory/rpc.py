"""The gRPC service of memory: retrieval for agents and tools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from infra.service.service import Runtime
from infra.web import rpc
from protos.memory.v1 import memory_pb2, memory_pb2_grpc
from services.memory import rights
from services.memory.adapters import retrieval
from services.memory.retrieval import HYBRID, Query, Retrieval, Scored


class Memory(memory_pb2_grpc.MemoryServicer):
    def __init__(self, retrieval: Retrieval) -> None:
        self._retrieval = retrieval

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


def servicer(runtime: Runtime) -> tuple[Callable[[Any, Any], None], Memory]:
    return memory_pb2_grpc.add_MemoryServicer_to_server, Memory(retrieval(runtime))


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
