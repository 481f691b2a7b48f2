"""Old credentials of an account, the time of a conversation's last message, indexes for lists by channel."""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    # old_credentials, encrypted: calls signed with them are accepted until old_until.
    op.execute("ALTER TABLE account ADD COLUMN old_credentials bytea, ADD COLUMN old_until timestamptz")
    # last_at: of the last inbound message. It is in no index, so an update of it stays cheap.
    op.execute("ALTER TABLE conversation ADD COLUMN last_at timestamptz")
    op.execute("CREATE INDEX conversation_channel ON conversation (channel_id)")
    op.execute("CREATE INDEX delivery_channel ON delivery (channel_id, created_at)")
    op.execute("CREATE INDEX delivery_session ON delivery (session_key, created_at)")
