"""Documents that were made of a file which a person sent in a chat."""

from alembic import op

revision = "0017"
down_revision = "0016"


def upgrade() -> None:
    op.execute("ALTER TABLE document ADD subject_id text, ADD channel_id uuid, ADD message_id uuid")
    op.execute("CREATE INDEX document_subject ON document (tenant_id, subject_id) WHERE subject_id IS NOT NULL")
