"""A correction of earlier usage keeps the tax of that time, so an invoice may have several taxes."""

from alembic import op

revision = "0034"
down_revision = "0033"


def upgrade() -> None:
    op.execute(
        "ALTER TABLE invoice ADD COLUMN other_taxes text NOT NULL DEFAULT '[]'  -- JSON, beside that of tax_note"
    )
    op.execute("ALTER TABLE invoice_line ADD COLUMN tax_note text  -- NULL: the invoice's")
