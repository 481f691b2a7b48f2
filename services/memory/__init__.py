"""Memory. Owns: documents and their passages, the index of their embeddings, memories of people and tenants, the
replies of agents per session. Handles: memory.v1.IndexDocument, agent.v1.RunCompleted and
RunMessageDeleted, user.v1.SubjectErased.
Publishes: billing.v1.UsageRecorded. Serves: HTTP ``/api/v1/documents``, ``/api/v1/memories`` and ``/api/v1/memory``,
gRPC ``Memory``.

Rooms, each importing only those below: search (by meaning and by words), knowledge (documents),
memories (of people, and replies), indexes (models and engines of vectors) and files (the parser's process and formats),
metering (usage, and the question whether billing pays for work).
"""
