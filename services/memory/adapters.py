"""Builds the object store, the embedding models and the indexes of memory, one of each per process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import cache, partial

from infra.security.subjects import SubjectKeys
from infra.service.service import Runtime
from infra.stores.objects import Objects
from protos.billing.v1 import billing_pb2_grpc
from services.memory.indexes.embeddings import LOCAL, Embedder, Endpoint, LocalEmbedder, RemoteEmbedder
from services.memory.indexes.engines import Engines
from services.memory.indexes.factory import make_index
from services.memory.indexes.model_change import ModelChange
from services.memory.indexes.models import EmbeddingModels
from services.memory.knowledge.indexing import Indexing
from services.memory.knowledge.sent_files import SentFiles
from services.memory.knowledge.uploads import Uploads
from services.memory.memories.conversations import Conversations
from services.memory.memories.keeping import Keeping
from services.memory.memories.learning import Learning
from services.memory.memories.store import Memories
from services.memory.metering.credit import Credit
from services.memory.search.reranking import Reranker
from services.memory.search.retrieval import Retrieval


@cache
def credit(runtime: Runtime) -> Credit:
    # Calls are not repeated here: lanes repeat their work, and searches have no time.
    return Credit(billing_pb2_grpc.BillingStub(runtime.channels.to(runtime.settings.billing_grpc, "billing")))


@cache
def objects(runtime: Runtime) -> Objects:
    settings = runtime.settings
    return Objects(settings.s3_endpoint, settings.s3_access_key, settings.s3_secret_key.get_secret_value())


@cache
def uploads(runtime: Runtime) -> Uploads:
    return Uploads(runtime.worker, objects(runtime))


@cache
def models(runtime: Runtime) -> EmbeddingModels:
    settings = runtime.settings
    wanted = LOCAL
    if settings.embedding_base_url:
        api_key = settings.embedding_api_key.get_secret_value() if settings.embedding_api_key else None
        wanted = Endpoint(settings.embedding_model, settings.embedding_base_url, api_key)

    def make(key: str, place: Endpoint) -> Embedder:
        if place.base_url is None:
            return LocalEmbedder(key)
        return RemoteEmbedder(runtime.outgoing, place.base_url, place.name, place.api_key, key)

    return EmbeddingModels(runtime.worker, runtime.cipher, wanted, make)


@cache
def index(runtime: Runtime) -> Engines:
    settings = runtime.settings
    milvus_url = settings.milvus_url.get_secret_value()
    return Engines(runtime.worker, partial(make_index, runtime.worker, milvus_url, settings.topic_prefix))


def model_change(runtime: Runtime) -> ModelChange:
    return ModelChange(runtime.worker, models(runtime), index(runtime))


def conversations(runtime: Runtime) -> Conversations:
    return Conversations(runtime.cipher, models(runtime), index(runtime), credit(runtime))


def memories(runtime: Runtime) -> Memories:
    return Memories(SubjectKeys(runtime.cipher))


def keeping(runtime: Runtime) -> Keeping:
    return Keeping(SubjectKeys(runtime.cipher))


def learning(runtime: Runtime) -> Learning:
    return Learning(keeping(runtime), memories(runtime), models(runtime), credit(runtime))


def indexing(runtime: Runtime) -> Indexing:
    return Indexing(objects(runtime), models(runtime), index(runtime), credit(runtime))


def reranker(runtime: Runtime) -> Reranker | None:
    settings = runtime.settings
    if not settings.rerank_base_url:
        return None
    key = settings.rerank_api_key.get_secret_value() if settings.rerank_api_key else None
    return Reranker(runtime.outgoing, settings.rerank_base_url, settings.rerank_model, key)


def retrieval(runtime: Runtime) -> Retrieval:
    return Retrieval(
        runtime.request,
        runtime.worker,
        models(runtime).active,
        index(runtime),
        conversations(runtime),
        memories(runtime),
        credit(runtime),
        reranker(runtime),
    )


def sent_files(runtime: Runtime) -> SentFiles:
    subjects = SubjectKeys(runtime.cipher)
    return SentFiles(runtime.request, objects(runtime), uploads(runtime), subjects, credit(runtime))


def milvus(runtime: Runtime) -> Callable[[], Awaitable[None]]:
    return index(runtime).check_milvus
