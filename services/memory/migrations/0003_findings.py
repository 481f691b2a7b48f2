"""The parser's remarks about a document: its pages, the pages without text, and warnings."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.execute("""
        ALTER TABLE document
            ADD COLUMN pages int,
            ADD COLUMN pages_without_text int[] NOT NULL DEFAULT '{}',
            ADD COLUMN warnings text[] NOT NULL DEFAULT '{}'
    """)
