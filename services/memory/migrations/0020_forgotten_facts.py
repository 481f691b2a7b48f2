"""Facts that people have forgotten or corrected are not learned again from words that they said before. The texts of
forgotten memories are removed from the stored events."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0020"
down_revision = "0019"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE forgotten_fact (
            tenant_id text NOT NULL,
            subject_id text NOT NULL,
            fact bytea NOT NULL,                -- digest of a text, or the id of a run in which a model found it
            forgotten_at timestamptz NOT NULL,
            PRIMARY KEY (tenant_id, subject_id, fact)
        )
    """)
    for statement in tenant_policy("memory", "forgotten_fact"):
        op.execute(statement)
    op.execute("""
        UPDATE event AS e
        SET data = convert_to(jsonb_set(convert_from(data, 'UTF8')::jsonb, '{text}', '""')::text, 'UTF8')
        WHERE type IN ('MemoryLearned', 'MemoryChanged')
            AND EXISTS (SELECT FROM event AS f WHERE f.stream_id = e.stream_id AND f.type = 'MemoryForgotten')
            AND NOT EXISTS (SELECT FROM memory AS m WHERE 'memory:' || m.id = e.stream_id)
    """)
