"""The readers of each document, and its tags."""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.execute("""
        ALTER TABLE document
            ADD COLUMN audience text[] NOT NULL DEFAULT '{all}',    -- all, agent:<id>, member:<id>, group:<name>
            ADD COLUMN tags text[] NOT NULL DEFAULT '{}',
            ADD COLUMN created_by text NOT NULL DEFAULT ''          -- the actor who uploaded it
    """)
    op.execute("CREATE INDEX document_restricted ON document (tenant_id) WHERE audience <> '{all}'")
