"""The messages of a channel and of a conversation by their time; the channels of a tenant that have conversations."""

from alembic import op

revision = "0018"
down_revision = "0017"


def upgrade() -> None:
    # A fact's channel is in its data only. `services.channel.history` has the same expression.
    channel = """substring(data, position('"channel_id":"' in data) + 14, 36)"""
    for name, of in ("event_channel", f"({channel})"), ("event_conversation", "stream_id"):
        op.execute(f"CREATE INDEX {name} ON event ({of}, recorded_at, event_id) WHERE type = 'MessageTaken'")
    # In place of one of each column. The columns never change, so an update of last_at stays cheap.
    op.execute("CREATE INDEX conversation_channels ON conversation (tenant_id, channel_id)")
    op.execute("DROP INDEX conversation_tenant, conversation_channel")
