"""Tables: account, conversation, inbound_seen, delivery."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0001"
down_revision = None


def upgrade() -> None:
    # token: of the webhook path, looked up by its SHA-256. pseudonyms: the key from which this account's session keys
    # and subject ids are derived. Both, and the credentials, are encrypted. broken_reason: why the vendor refuses the
    # account; null: the account works.
    op.execute(
        "CREATE TABLE account (id uuid PRIMARY KEY, seq bigint GENERATED ALWAYS AS IDENTITY, tenant_id text NOT NULL, "
        "type text NOT NULL, agent_id uuid NOT NULL, token_hash bytea NOT NULL UNIQUE, token bytea NOT NULL, "
        "credentials bytea NOT NULL, pseudonyms bytea NOT NULL, api_base text, enabled boolean NOT NULL DEFAULT true, "
        "broken_reason text, created_at timestamptz NOT NULL DEFAULT clock_timestamp(), "
        "updated_at timestamptz NOT NULL DEFAULT clock_timestamp())"
    )
    op.execute("CREATE INDEX account_tenant ON account (tenant_id, seq)")
    # subject_id: the last person who wrote; replies are encrypted with that person's key.
    op.execute(
        "CREATE TABLE conversation (session_key text PRIMARY KEY, tenant_id text NOT NULL, channel_id uuid NOT NULL, "
        "subject_id text NOT NULL)"
    )
    # Hashes of vendors' ids; a message is stored under each of its ids. ignored: why it started no run.
    op.execute(
        "CREATE TABLE inbound_seen (hash bytea PRIMARY KEY, tenant_id text NOT NULL, channel_id uuid NOT NULL, "
        "ignored text, seen_at timestamptz NOT NULL DEFAULT clock_timestamp())"
    )
    op.execute("CREATE INDEX inbound_seen_age ON inbound_seen (seen_at)")
    op.execute(
        "CREATE TABLE delivery (id uuid PRIMARY KEY, seq bigint GENERATED ALWAYS AS IDENTITY, tenant_id text NOT NULL, "
        "channel_id uuid NOT NULL, session_key text NOT NULL, run_id uuid, state text NOT NULL, reason text, "
        "vendor_message_id text, created_at timestamptz NOT NULL DEFAULT clock_timestamp(), "
        "updated_at timestamptz NOT NULL DEFAULT clock_timestamp())"
    )
    op.execute("CREATE INDEX delivery_tenant ON delivery (tenant_id, seq)")
    op.execute("CREATE INDEX delivery_run ON delivery (run_id)")
    for table in ("account", "conversation", "inbound_seen", "delivery"):
        for statement in tenant_policy("channel", table):
            op.execute(statement)
