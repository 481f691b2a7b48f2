"""Memory. Owns: documents and their passages, the index of their embeddings, the replies of agents per session.
Handles: memory.v1.IndexDocument, agent.v1.RunCompleted, user.v1.SubjectErased. Publishes: billing.v1.UsageRecorded.
Serves: HTTP ``/api/v1/documents`` and ``/api/v1/memory/search``, gRPC ``Memory``."""
