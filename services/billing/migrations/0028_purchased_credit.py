"""Credit that tenants buy: invoices without a period, and grants whose tax was paid at the sale."""

from alembic import op

revision = "0028"
down_revision = "0027"


def upgrade() -> None:
    op.execute("""
        ALTER TABLE invoice
        ALTER COLUMN period DROP NOT NULL,
        ADD COLUMN purpose text NOT NULL DEFAULT 'usage' CHECK (purpose IN ('usage', 'credit')),
        ADD CHECK ((period IS NULL) = (purpose = 'credit'))
    """)
    # The orders that are never paid stay drafts. The clock must not read them at each tick.
    op.execute("DROP INDEX invoice_draft")
    op.execute("CREATE INDEX invoice_draft ON invoice (made_at) WHERE status = 'draft' AND purpose = 'usage'")
    op.execute("ALTER TABLE credit_grant DROP CONSTRAINT credit_grant_kind_check")
    op.execute("""
        ALTER TABLE credit_grant
        ADD CONSTRAINT credit_grant_kind_check CHECK (kind IN ('prepaid', 'promotional', 'purchased')),
        ADD COLUMN frozen_nanos bigint NOT NULL DEFAULT 0 CHECK (frozen_nanos >= 0),    -- while its money is disputed
        ADD COLUMN invoice_id uuid,                                                     -- of the sale
        ADD UNIQUE (tenant_id, invoice_id),
        ADD FOREIGN KEY (tenant_id, invoice_id) REFERENCES invoice
    """)
    op.execute("ALTER TABLE journal_line DROP CONSTRAINT journal_line_account_check")
    op.execute("""
        ALTER TABLE journal_line
        ADD CONSTRAINT journal_line_account_check CHECK (account IN (
            'cash', 'receivable', 'revenue', 'tax', 'prepaid', 'purchased', 'promotional_credit', 'promotional_cost',
            'write_off', 'disputed', 'rounding'
        ))
    """)
