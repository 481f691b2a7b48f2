"""Due dates of invoices, and the mails that ask for payment."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE payment_terms (
            tenant_id text PRIMARY KEY,
            due_days int NOT NULL CHECK (due_days >= 0),
            reminder_days int[] NOT NULL,   -- after the due date, ascending
            write_off_days int              -- after the due date; null: never
        )
    """)
    for statement in tenant_policy("billing", "payment_terms"):
        op.execute(statement)
    op.execute("""
        ALTER TABLE invoice
        ADD COLUMN due_at timestamptz,
        ADD COLUMN dunning_step int NOT NULL DEFAULT 0,     -- the next one; 0: the invoice itself is sent
        ADD COLUMN dunning_at timestamptz NOT NULL DEFAULT 'infinity'
    """)
    op.execute("ALTER TABLE invoice DISABLE TRIGGER invoice_stays")
    op.execute("""
        UPDATE invoice
        SET due_at = finalised_at + interval '14 days', dunning_step = 1, dunning_at = finalised_at + interval '17 days'
        WHERE status <> 'draft'
    """)
    op.execute("ALTER TABLE invoice ENABLE TRIGGER invoice_stays")
    op.execute("ALTER TABLE invoice ADD CHECK ((due_at IS NULL) = (status = 'draft'))")
    op.execute("""
        CREATE INDEX invoice_dunning ON invoice (dunning_at)
        WHERE status = 'finalised' OR (status = 'paid' AND dunning_step = 0)
    """)
    op.execute("""
        CREATE OR REPLACE FUNCTION invoice_stays() RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE
            changing text[] := ARRAY['status', 'applied_minor', 'paid_minor', 'credited_minor', 'dunning_step',
                                     'dunning_at'];
        BEGIN
            IF OLD.status <> 'draft' AND (
                NEW.status = 'draft' OR to_jsonb(OLD) - changing <> to_jsonb(NEW) - changing
            ) THEN
                RAISE EXCEPTION 'invoice % is finalised and never changes', OLD.number
                USING ERRCODE = 'integrity_constraint_violation';
            END IF;
            RETURN NEW;
        END $$
    """)
