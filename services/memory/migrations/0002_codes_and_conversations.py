"""Codes in passages, for exact matches; and the agents' replies per session."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute("ALTER TABLE passage ADD COLUMN codes text[] NOT NULL DEFAULT '{}'")
    op.execute("CREATE INDEX passage_codes ON passage USING gin (codes)")
    op.execute("""
        CREATE TABLE utterance (
            run_id uuid PRIMARY KEY,
            tenant_id text NOT NULL,
            session_key text NOT NULL,
            sealed bytea NOT NULL,              -- the text
            model text,                         -- the embedding model of the vector
            vector bytea,                       -- little-endian float32
            expires_at timestamptz NOT NULL,
            CHECK ((model IS NULL) = (vector IS NULL))
        )
    """)
    for statement in tenant_policy("memory", "utterance"):
        op.execute(statement)
