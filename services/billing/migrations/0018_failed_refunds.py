"""A refund that fails after the provider has reported it is taken back."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0018"
down_revision = "0017"


def upgrade() -> None:
    # `refunded_minor` is without the failed refunds. `refund_sum_minor` is the largest sum that was reported with them.
    op.execute("""
        ALTER TABLE payment
        ADD COLUMN refund_sum_minor bigint NOT NULL DEFAULT 0,
        ADD COLUMN failed_refund_minor bigint NOT NULL DEFAULT 0
    """)
    op.execute("UPDATE payment SET refund_sum_minor = refunded_minor")
    op.execute("""
        CREATE TABLE reported_refund (
            tenant_id text NOT NULL,
            payment_id uuid NOT NULL,
            reference text NOT NULL,        -- the provider's id
            minor bigint NOT NULL,
            failed boolean NOT NULL,
            PRIMARY KEY (tenant_id, payment_id, reference),
            FOREIGN KEY (tenant_id, payment_id) REFERENCES payment
        )
    """)
    op.execute("REVOKE DELETE ON reported_refund FROM billing_request, billing_worker")
    for statement in tenant_policy("billing", "reported_refund"):
        op.execute(statement)
