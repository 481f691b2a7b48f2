"""The messages that memory handles, and the work of its lanes."""

from __future__ import annotations

from infra.clock import time_of
from infra.errors import EffectFailed, NotYet, Transient
from infra.lanes.effects import Effects
from infra.postgres.tx import Tx
from protos.catalog import AGENT_EVENTS, DOCUMENT_INDEX, PLATFORM_EVENTS
from protos.messages.agent import RunCompleted, RunMessageDeleted
from protos.messages.memory import IndexDocument
from protos.messages.user import SubjectErased
from services.memory.indexes.models import EmbeddingModels
from services.memory.knowledge import documents
from services.memory.knowledge.indexing import Indexing
from services.memory.knowledge.versions import OldVersion
from services.memory.lanes import (
    DOCUMENTS,
    FILLS,
    MEMORIES,
    UTTERANCES,
    DocumentWork,
    FillWork,
    MemoryWork,
    UtteranceWork,
    enqueue_document,
    enqueue_fill,
    enqueue_memory,
    enqueue_utterance,
)
from services.memory.memories.conversations import KEEP, Conversations
from services.memory.memories.forgetting import erase
from services.memory.memories.learning import FinishedRun, Learning


@DOCUMENT_INDEX.worker(prefetch=20)
async def index_document(message: IndexDocument, tx: Tx) -> None:
    enqueue_document(tx, message.document_id, "index")


@AGENT_EVENTS.each(RunCompleted, group="memory")
async def remember_run(event: RunCompleted, tx: Tx, conversations: Conversations, learning: Learning) -> None:
    if event.reply.strip() and await conversations.add(
        tx, event.run_id, event.session_key, event.subject_id, event.reply
    ):
        enqueue_utterance(tx, event.run_id, "embed")
        enqueue_utterance(tx, event.run_id, "forget", KEEP)
    if event.learning == "model":
        # The agent service sends the facts that its model found, or the message if the model gave no usable answer.
        return
    assert tx.cause
    run = FinishedRun(event.run_id, event.subject_id, event.channel_id, event.message_id, tx.cause.time)
    for memory_id in await learning.by_rules(tx, run, event.said):
        enqueue_memory(tx, memory_id)


@AGENT_EVENTS.each(RunMessageDeleted, group="memory")
async def forget_message(event: RunMessageDeleted, tx: Tx, learning: Learning) -> None:
    """The facts that were learned from the run are forgotten. Rules search the words that are left."""
    # The time of the deletion would make these facts newer than those that were said since.
    run = FinishedRun(event.run_id, event.subject_id, event.channel_id, None, time_of(event.run_id))
    for memory_id in await learning.after_deletion(tx, run, event.message_id, event.said):
        enqueue_memory(tx, memory_id)


@MEMORIES.runner(concurrency=1)
async def work_on_memory(item: MemoryWork, effects: Effects, tx: Tx, learning: Learning) -> None:
    await learning.embed(item.memory_id, effects, tx)


@PLATFORM_EVENTS.each(SubjectErased, group="memory")
async def forget_person(event: SubjectErased, tx: Tx, conversations: Conversations) -> None:
    await erase(tx, event.tenant_id, event.subject_id)
    await documents.delete(tx, await documents.made_of(tx, event.subject_id))
    for run_id in await conversations.erase(tx, event.subject_id):
        # Behind an embedding that may be under way, which would put the vector back.
        tx.enqueue(UTTERANCES, lane=f"embed {run_id}", item=UtteranceWork(run_id, "forget"))


@FILLS.runner(concurrency=2, per_tenant=1)
async def fill_index(item: FillWork, effects: Effects, tx: Tx, indexing: Indexing, models: EmbeddingModels) -> None:
    model = await models.of(item.model)
    if model is None:
        return
    try:
        await indexing.fill(item.document_id, item.owner, model, effects)
    except NotYet:
        raise
    except (Transient, EffectFailed) as error:
        await models.note(model.key, error)
        if isinstance(error, Transient):
            raise
    else:
        await models.note(model.key, None)


# One document per tenant at a time, so that a tenant's large or hostile files keep no other tenant waiting. Parsing and
# embedding use all processors: more documents at once would only make each of them slower.
@DOCUMENTS.runner(concurrency=3, per_tenant=1)
async def work_on_document(
    item: DocumentWork, effects: Effects, tx: Tx, indexing: Indexing, models: EmbeddingModels
) -> None:
    match item.act:
        case "index":
            if replaced := await indexing.index(item.document_id, effects, tx):
                document_id, (path, owner) = replaced
                work = DocumentWork(document_id, "remove_version", path, owner)
                tx.enqueue(DOCUMENTS, lane=str(document_id), item=work)
        case "fill":
            enqueue_fill(tx, item.document_id, (await models.active()).key, None)
        case "remove":
            await indexing.remove(item.document_id, effects, tx)
        case "remove_version":
            assert item.owner
            await indexing.remove_version(OldVersion(item.path, item.owner), effects)


@UTTERANCES.runner(concurrency=1)
async def work_on_utterance(item: UtteranceWork, effects: Effects, tx: Tx, conversations: Conversations) -> None:
    match item.act:
        case "embed":
            await conversations.embed(item.run_id, effects, tx)
        case "forget":
            await conversations.forget(item.run_id, effects, tx)
