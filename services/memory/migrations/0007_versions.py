"""The next version of a document is a row of its own until it is indexed; then it takes the place of the old one."""

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.execute("""
        ALTER TABLE document
            ADD COLUMN version int NOT NULL DEFAULT 1,
            ADD COLUMN replaces uuid,           -- the document whose next version this row is
            ADD COLUMN index_owner uuid,        -- the owner of its rows in the index; NULL: its id
            ADD COLUMN indexed_in text[] NOT NULL DEFAULT '{}'      -- the indexes that have all of its rows
    """)
    op.execute("""
        CREATE UNIQUE INDEX document_next_version ON document (replaces)
        WHERE replaces IS NOT NULL AND deleted_at IS NULL
    """)
