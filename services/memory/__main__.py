"""Starts memory: documents, their passages and embeddings, retrieval."""

from infra.security.subjects import erasure
from infra.service.service import Service
from services.memory import adapters, api, handlers, rpc, tenants
from services.memory.indexes import models
from services.memory.knowledge import uploads
from services.memory.memories import conversations
from services.memory.memories.keeping import MEMORY
from services.memory.memories.read_models import READ_MODELS
from services.memory.metering import storage
from services.memory.settings import MemorySettings

service = Service("memory", MemorySettings)
service.depend("milvus", adapters.milvus)
service.seal(conversations.SEALED, models.SEALED)
service.serve_http(api.routes)
service.serve_grpc(rpc.servicer)
service.consume(handlers.index_document)
service.own(MEMORY)
service.project(*READ_MODELS)
service.consume(handlers.remember_run, conversations=adapters.conversations, learning=adapters.learning)
service.consume(handlers.forget_message, learning=adapters.learning)
service.consume(erasure("memory"))
service.erase_tenants(before=tenants.delete_outside)
service.consume(handlers.forget_person, conversations=adapters.conversations)
service.work(handlers.work_on_document, indexing=adapters.indexing, models=adapters.models)
service.work(uploads.check_upload, objects=adapters.objects)
service.work(handlers.fill_index, indexing=adapters.indexing, models=adapters.models)
service.work(handlers.work_on_utterance, conversations=adapters.conversations)
service.work(handlers.work_on_memory, learning=adapters.learning)
service.beside("embedding models", adapters.model_change)
service.beside("storage", lambda runtime: storage.Sampler(runtime.worker))

if __name__ == "__main__":
    service.run()
