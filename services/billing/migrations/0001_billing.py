"""Accounts, holds, usage and its verdicts, the ledger, the price book."""

from alembic import op
from sqlalchemy import text

from infra.postgres.schema import tenant_policy
from services.billing.rating.price_book import seed, write

revision = "0001"
down_revision = None


def upgrade() -> None:
    # All money is in nano-units (10⁻⁹) of the account's currency.
    op.execute("""
        CREATE TABLE account (
            tenant_id text PRIMARY KEY,
            currency text NOT NULL,
            credit_nanos bigint,                        -- sum of all credit ever granted; null: no limit
            debited_nanos bigint NOT NULL DEFAULT 0,    -- all charges minus corrections
            opened_at timestamptz NOT NULL DEFAULT clock_timestamp()
        )
    """)
    op.execute("""
        CREATE TABLE hold (
            tenant_id text NOT NULL,
            hold_id uuid NOT NULL,
            request text NOT NULL,          -- the request: resource, quantities and expiry, JSON
            granted boolean NOT NULL,
            held_nanos bigint NOT NULL,
            available_nanos bigint,         -- as in the answer; null: no limit
            expires_at timestamptz NOT NULL,
            ended_at timestamptz,
            outcome text CHECK (outcome IN ('refused', 'charged', 'released')),
            PRIMARY KEY (tenant_id, hold_id),
            CHECK ((ended_at IS NULL) = (outcome IS NULL))
        )
    """)
    op.execute("CREATE INDEX hold_open ON hold (tenant_id, expires_at) INCLUDE (held_nanos) WHERE ended_at IS NULL")
    # Numbers the records of both tables in the order of their arrival.
    op.execute("CREATE SEQUENCE arrival CACHE 1")
    op.execute("""
        CREATE TABLE usage (
            tenant_id text NOT NULL,
            usage_id text NOT NULL,
            arrival bigint NOT NULL DEFAULT nextval('arrival'),
            message_id uuid NOT NULL,
            resource text NOT NULL,
            quantities jsonb NOT NULL,
            occurred_at timestamptz NOT NULL,
            estimated boolean NOT NULL,
            run_id uuid,
            hold_id uuid,
            verdict text NOT NULL CHECK (verdict IN ('counted', 'rejected', 'held')),
            reason text NOT NULL,
            amount_nanos bigint,
            price_version text,
            rated_at timestamptz NOT NULL,
            span_id text NOT NULL,
            PRIMARY KEY (tenant_id, usage_id),
            CHECK ((amount_nanos IS NULL) = (verdict = 'held'))
        )
    """)
    op.execute("CREATE INDEX usage_time ON usage (tenant_id, occurred_at)")
    op.execute("CREATE INDEX usage_run ON usage (run_id) WHERE run_id IS NOT NULL")
    op.execute("CREATE INDEX usage_held ON usage (tenant_id, usage_id) WHERE verdict = 'held'")
    # Repeated records: their usage_id was recorded before.
    op.execute("""
        CREATE TABLE duplicate (
            tenant_id text NOT NULL,
            arrival bigint NOT NULL DEFAULT nextval('arrival'),
            usage_id text NOT NULL,
            message_id uuid NOT NULL,
            resource text NOT NULL,
            quantities jsonb NOT NULL,
            occurred_at timestamptz NOT NULL,
            run_id uuid,
            reason text NOT NULL,
            rated_at timestamptz NOT NULL,
            PRIMARY KEY (tenant_id, usage_id, arrival)
        )
    """)
    op.execute("CREATE INDEX duplicate_run ON duplicate (run_id) WHERE run_id IS NOT NULL")
    op.execute("""
        CREATE TABLE ledger_entry (
            tenant_id text NOT NULL,
            entry bigint GENERATED ALWAYS AS IDENTITY,
            kind text NOT NULL CHECK (kind IN ('credit', 'charge', 'correction')),
            amount_nanos bigint NOT NULL,   -- above zero: in the tenant's favour
            usage_id text,
            price_version text,
            reason text NOT NULL,
            actor text NOT NULL,
            made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (tenant_id, entry)
        )
    """)
    op.execute("""
        CREATE TABLE price (
            resource text NOT NULL,
            version int NOT NULL,
            currency text NOT NULL,
            valid_from timestamptz NOT NULL,
            prices text NOT NULL,           -- nano-units per unit as decimal strings, JSON
            made_by text NOT NULL,
            made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (resource, version)
        )
    """)
    # Messages that channels delivered, per day (UTC). The type of a channel is known from its messages.
    op.execute("""
        CREATE TABLE delivered (
            tenant_id text NOT NULL,
            day date NOT NULL,
            channel_id uuid NOT NULL,
            messages bigint NOT NULL,
            PRIMARY KEY (tenant_id, day, channel_id)
        )
    """)
    op.execute("CREATE TABLE channel (channel_id uuid PRIMARY KEY, tenant_id text NOT NULL, type text NOT NULL)")
    # Rows of these tables never change. A mistake is corrected by a new entry or version.
    for table in ("ledger_entry", "price"):
        op.execute(f"REVOKE UPDATE, DELETE ON {table} FROM billing_request, billing_worker")
    op.execute("REVOKE INSERT ON price FROM billing_request")
    for table in ("account", "hold", "usage", "duplicate", "ledger_entry", "delivered", "channel"):
        for statement in tenant_policy("billing", table):
            op.execute(statement)
    insert = text(
        "INSERT INTO price (resource, version, currency, valid_from, prices, made_by) "
        "VALUES (:resource, :version, :currency, :valid_from, :prices, 'genai-prices')"
    )
    op.get_bind().execute(
        insert,
        [
            {
                "resource": price.resource,
                "version": price.version,
                "currency": price.currency,
                "valid_from": price.valid_from,
                "prices": write(price),
            }
            for price in seed()
        ],
    )
