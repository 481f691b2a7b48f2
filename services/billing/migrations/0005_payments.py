"""Payments, refunds and disputes by payment providers, and corrections of rated usage."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE payment_method (
            tenant_id text NOT NULL,
            method_id uuid NOT NULL,
            provider text NOT NULL,
            reference text NOT NULL,        -- the provider's id of the method
            customer text NOT NULL,         -- the provider's id of the tenant
            made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (tenant_id, method_id),
            UNIQUE (tenant_id, provider, reference)
        )
    """)
    op.execute("""
        CREATE TABLE payment (
            tenant_id text NOT NULL,
            payment_id uuid NOT NULL,
            invoice_id uuid NOT NULL,
            provider text NOT NULL,
            reference text NOT NULL DEFAULT '',     -- the provider's id; empty until it has answered
            method_id uuid,
            amount_minor bigint NOT NULL CHECK (amount_minor > 0),
            currency text NOT NULL,
            status text NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'succeeded', 'failed')),
            failure text NOT NULL DEFAULT '',
            received_minor bigint NOT NULL DEFAULT 0,
            refunded_minor bigint NOT NULL DEFAULT 0,
            made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (tenant_id, payment_id),
            FOREIGN KEY (tenant_id, invoice_id) REFERENCES invoice
        )
    """)
    # An invoice has one payment at a time that is not decided, so two callers cannot charge it twice.
    op.execute("CREATE UNIQUE INDEX payment_pending ON payment (tenant_id, invoice_id) WHERE status = 'pending'")
    op.execute("CREATE UNIQUE INDEX payment_reference ON payment (provider, reference) WHERE reference <> ''")
    op.execute("CREATE UNIQUE INDEX payment_id ON payment (payment_id)")
    op.execute("""
        CREATE TABLE dispute (
            tenant_id text NOT NULL,
            payment_id uuid NOT NULL,
            reference text NOT NULL,        -- the provider's id
            minor bigint NOT NULL,
            state text NOT NULL CHECK (state IN ('open', 'won', 'lost')),
            PRIMARY KEY (tenant_id, payment_id, reference),
            FOREIGN KEY (tenant_id, payment_id) REFERENCES payment
        )
    """)
    op.execute("""
        CREATE TABLE refund (
            tenant_id text NOT NULL,
            refund_id uuid NOT NULL,
            payment_id uuid NOT NULL,
            minor bigint NOT NULL CHECK (minor > 0),
            reason text NOT NULL,
            actor text NOT NULL,
            status text NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'made', 'failed')),
            made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (tenant_id, refund_id),
            FOREIGN KEY (tenant_id, payment_id) REFERENCES payment
        )
    """)
    # Every event that a provider has sent, once.
    op.execute("""
        CREATE TABLE payment_event (
            provider text NOT NULL,
            event_id text NOT NULL,
            kind text NOT NULL,
            reference text NOT NULL,
            minor bigint NOT NULL,
            outcome text NOT NULL CHECK (outcome IN ('applied', 'ignored', 'unmatched')),
            received_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (provider, event_id)
        )
    """)
    op.execute("""
        CREATE TABLE usage_correction (
            tenant_id text NOT NULL,
            usage_id text NOT NULL,
            price_version text NOT NULL,    -- of the new price
            nanos bigint NOT NULL,          -- new cost minus the cost booked before
            period bigint NOT NULL,
            made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (tenant_id, usage_id, price_version),
            FOREIGN KEY (tenant_id, usage_id) REFERENCES usage
        )
    """)
    op.execute("CREATE INDEX usage_period ON usage (tenant_id, period, arrival) WHERE period > 0")
    op.execute("""
        CREATE VIEW correction_measure WITH (security_invoker = true) AS
        SELECT c.tenant_id, c.usage_id, u.arrival, c.period, true AS late, u.occurred_at, u.run_id,
               date_trunc('hour', u.occurred_at, 'UTC') AS hour, u.agent_id, u.channel_id, u.resource,
               c.price_version, 'correction_nanos' AS meter, c.nanos::numeric AS quantity,
               ('x' || encode(substr(sha256(convert_to(
                   concat_ws('|', c.usage_id, c.price_version, c.nanos), 'UTF8'
               )), 1, 8), 'hex'))::bit(64)::bigint AS digest
        FROM usage_correction AS c
        JOIN usage AS u USING (tenant_id, usage_id)
    """)
    op.execute("REVOKE UPDATE, DELETE ON usage_correction, payment_event FROM billing_request, billing_worker")
    op.execute("REVOKE DELETE ON payment, refund, dispute FROM billing_request, billing_worker")
    op.execute("REVOKE SELECT, INSERT ON payment_event FROM billing_request")
    for table in ("payment_method", "payment", "dispute", "refund", "usage_correction"):
        for statement in tenant_policy("billing", table):
            op.execute(statement)
