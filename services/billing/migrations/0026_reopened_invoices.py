"""An invoice that is open again is reminded of from the first reminder on."""

from alembic import op

revision = "0026"
down_revision = "0025"


def upgrade() -> None:
    op.execute("ALTER TABLE invoice ADD COLUMN reopened_at timestamptz      -- null: it was never paid before")
    op.execute("""
        CREATE OR REPLACE FUNCTION invoice_stays() RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE
            changing text[] := ARRAY['status', 'applied_minor', 'paid_minor', 'credited_minor', 'dunning_step',
                                     'dunning_at', 'reopened_at'];
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
