"""Memories: facts that people said about themselves, and notes of tenants. The read model of the streams `memory`."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE memory (
            id uuid PRIMARY KEY,
            tenant_id text NOT NULL,
            scope text NOT NULL CHECK (scope IN ('tenant', 'agent', 'user', 'session')),
            scope_id text NOT NULL,             -- empty, the agent's id, the person's subject id, the session key
            subject_id text NOT NULL,           -- the person under whose key the text is sealed
            kind text NOT NULL CHECK (kind IN ('fact', 'preference', 'decision', 'promise')),
            sealed bytea NOT NULL,              -- the text
            digest bytea NOT NULL,              -- of the text
            topic bytea,                        -- digest; only the newest fact on a topic is true
            importance smallint NOT NULL CHECK (importance BETWEEN 1 AND 10),
            confidence real NOT NULL CHECK (confidence BETWEEN 0 AND 1),
            speaker text NOT NULL,              -- person, or the actor who wrote it by the API
            run_id uuid,
            message_id text,
            said_at timestamptz NOT NULL,
            uses int NOT NULL DEFAULT 0,
            used_at timestamptz NOT NULL,
            expires_at timestamptz,
            replaced_by uuid,                   -- the newer fact that contradicts it
            model text,                         -- the embedding model of the vector
            vector bytea,                       -- little-endian float32
            CHECK ((model IS NULL) = (vector IS NULL))
        )
    """)
    op.execute("""
        CREATE UNIQUE INDEX memory_once ON memory (tenant_id, scope, scope_id, digest) WHERE replaced_by IS NULL
    """)
    op.execute("""
        CREATE UNIQUE INDEX memory_topic ON memory (tenant_id, scope, scope_id, topic)
        WHERE replaced_by IS NULL AND topic IS NOT NULL
    """)
    op.execute("CREATE INDEX memory_list ON memory (tenant_id, said_at, id)")
    op.execute("CREATE INDEX memory_subject ON memory (tenant_id, subject_id)")
    for statement in tenant_policy("memory", "memory"):
        op.execute(statement)
