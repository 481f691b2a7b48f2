"""Journal, grants, plans, subscriptions, periods, invoices and taxes."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0003"
down_revision = "0002"

_TABLES = (
    "journal_entry",
    "journal_line",
    "credit_grant",
    "subscription",
    "period",
    "invoice",
    "invoice_line",
    "invoice_series",
    "credit_note",
    "buyer",
)


def upgrade() -> None:
    # The general ledger. A line is a debit above zero and a credit below zero; each entry's lines add up to zero.
    op.execute("""
        CREATE TABLE journal_entry (
            tenant_id text NOT NULL,
            entry bigint GENERATED ALWAYS AS IDENTITY,
            kind text NOT NULL,
            reference text NOT NULL,        -- the grant, invoice, credit note or payment
            reason text NOT NULL,
            actor text NOT NULL,
            made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (tenant_id, entry)
        )
    """)
    op.execute("CREATE INDEX journal_reference ON journal_entry (tenant_id, reference)")
    op.execute("""
        CREATE TABLE journal_line (
            tenant_id text NOT NULL,
            entry bigint NOT NULL,
            account text NOT NULL CHECK (account IN (
                'cash', 'receivable', 'revenue', 'tax', 'prepaid', 'promotional_credit', 'promotional_cost',
                'write_off', 'disputed', 'rounding'
            )),
            amount_nanos bigint NOT NULL CHECK (amount_nanos <> 0),
            PRIMARY KEY (tenant_id, entry, account),
            FOREIGN KEY (tenant_id, entry) REFERENCES journal_entry
        )
    """)
    op.execute("""
        CREATE FUNCTION journal_is_balanced() RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE
            total numeric;
        BEGIN
            SELECT sum(amount_nanos) INTO total
            FROM journal_line
            WHERE tenant_id = NEW.tenant_id AND entry = NEW.entry;
            IF total <> 0 THEN
                RAISE EXCEPTION 'journal entry % of tenant % is not balanced: %', NEW.entry, NEW.tenant_id, total
                USING ERRCODE = 'integrity_constraint_violation';
            END IF;
            RETURN NULL;
        END $$
    """)
    op.execute("""
        CREATE CONSTRAINT TRIGGER journal_is_balanced AFTER INSERT ON journal_line
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION journal_is_balanced()
    """)
    op.execute("ALTER TABLE ledger_entry DROP CONSTRAINT ledger_entry_kind_check")
    op.execute("""
        ALTER TABLE ledger_entry
        ADD CONSTRAINT ledger_entry_kind_check CHECK (kind IN ('credit', 'charge', 'correction', 'expiry'))
    """)
    op.execute("""
        ALTER TABLE account
        ADD COLUMN burned_nanos bigint NOT NULL DEFAULT 0,  -- the part of the debits that grants have covered
        ADD COLUMN next_expiry timestamptz NOT NULL DEFAULT 'infinity'
    """)
    op.execute("""
        CREATE TABLE credit_grant (
            tenant_id text NOT NULL,
            grant_id uuid NOT NULL,
            number bigint GENERATED ALWAYS AS IDENTITY,     -- the age
            kind text NOT NULL CHECK (kind IN ('prepaid', 'promotional')),
            nanos bigint NOT NULL CHECK (nanos > 0),
            left_nanos bigint NOT NULL CHECK (left_nanos BETWEEN 0 AND nanos),
            priority int NOT NULL,
            expires_at timestamptz NOT NULL,                -- 'infinity': never
            reason text NOT NULL,
            actor text NOT NULL,
            made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            expired_nanos bigint NOT NULL DEFAULT 0,
            PRIMARY KEY (tenant_id, grant_id)
        )
    """)
    op.execute("CREATE INDEX grant_left ON credit_grant (tenant_id, priority, expires_at, number) WHERE left_nanos > 0")
    # The credit of accounts that exist already becomes one promotional grant each, as far as it is not spent.
    op.execute("""
        WITH granted AS (
            INSERT INTO credit_grant (tenant_id, grant_id, kind, nanos, left_nanos, priority, expires_at, reason, actor)
            SELECT tenant_id, gen_random_uuid(), 'promotional', credit_nanos, greatest(0, credit_nanos - debited_nanos),
                   100, 'infinity', 'credit before grants were kept', 'billing'
            FROM account
            WHERE credit_nanos > 0
            RETURNING tenant_id, grant_id, left_nanos
        ),
        entry AS (
            INSERT INTO journal_entry (tenant_id, kind, reference, reason, actor)
            SELECT tenant_id, 'grant', grant_id::text, 'credit before grants were kept', 'billing'
            FROM granted
            WHERE left_nanos > 0
            RETURNING tenant_id, entry, reference
        )
        INSERT INTO journal_line (tenant_id, entry, account, amount_nanos)
        SELECT e.tenant_id, e.entry, a.account, a.sign * g.left_nanos
        FROM entry AS e
        JOIN granted AS g ON g.tenant_id = e.tenant_id AND g.grant_id::text = e.reference
        CROSS JOIN (VALUES ('promotional_cost', 1), ('promotional_credit', -1)) AS a(account, sign)
    """)
    op.execute("UPDATE account SET burned_nanos = least(debited_nanos, coalesce(credit_nanos, debited_nanos))")
    op.execute("""
        CREATE TABLE plan (
            plan_id uuid NOT NULL,
            version int NOT NULL,
            name text NOT NULL,
            content text NOT NULL,          -- JSON
            made_by text NOT NULL,
            made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (plan_id, version),
            UNIQUE (name, version)
        )
    """)
    op.execute("""
        CREATE TABLE subscription (
            tenant_id text NOT NULL,
            subscription_id uuid NOT NULL,
            plan_id uuid NOT NULL,          -- the plan of the periods to come
            plan_version int NOT NULL,
            anchor_day int NOT NULL CHECK (anchor_day BETWEEN 1 AND 31),
            time_zone text NOT NULL,
            starts_at timestamptz NOT NULL,
            ends_at timestamptz NOT NULL DEFAULT 'infinity',
            made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (tenant_id, subscription_id),
            FOREIGN KEY (plan_id, plan_version) REFERENCES plan,
            CHECK (starts_at <= ends_at)
        )
    """)
    op.execute("""
        CREATE TABLE period (
            tenant_id text NOT NULL,
            period bigint GENERATED ALWAYS AS IDENTITY,
            subscription_id uuid NOT NULL,
            plan_id uuid NOT NULL,
            plan_version int NOT NULL,
            begins timestamptz NOT NULL,
            ends timestamptz NOT NULL,
            full_begins timestamptz NOT NULL,   -- the whole period that this is a part of
            full_ends timestamptz NOT NULL,
            closed_at timestamptz,
            PRIMARY KEY (tenant_id, period),
            UNIQUE (tenant_id, begins),
            FOREIGN KEY (tenant_id, subscription_id) REFERENCES subscription,
            FOREIGN KEY (plan_id, plan_version) REFERENCES plan,
            CHECK (begins < ends)
        )
    """)
    op.execute("CREATE INDEX period_open ON period (tenant_id, begins) WHERE closed_at IS NULL")
    op.execute("CREATE INDEX period_due ON period (ends) WHERE closed_at IS NULL")
    op.execute("""
        CREATE TABLE invoice (
            tenant_id text NOT NULL,
            invoice_id uuid NOT NULL,
            period bigint NOT NULL,
            status text NOT NULL CHECK (status IN ('draft', 'finalised', 'paid', 'void', 'uncollectible')),
            number text,
            currency text NOT NULL,
            begins timestamptz NOT NULL,
            ends timestamptz NOT NULL,
            subtotal_nanos bigint NOT NULL,
            tax_nanos bigint NOT NULL,
            tax_note text NOT NULL,
            buyer text NOT NULL DEFAULT '{}',           -- as it was when the invoice was finalised, JSON
            total_minor bigint NOT NULL,
            applied_minor bigint NOT NULL DEFAULT 0,    -- covered by grants
            paid_minor bigint NOT NULL DEFAULT 0,
            credited_minor bigint NOT NULL DEFAULT 0,   -- by credit notes
            made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            finalised_at timestamptz,
            PRIMARY KEY (tenant_id, invoice_id),
            UNIQUE (tenant_id, period),                 -- a period is invoiced once
            UNIQUE (tenant_id, number),
            CHECK ((number IS NULL) = (status = 'draft')),
            CHECK ((finalised_at IS NULL) = (status = 'draft'))
        )
    """)
    op.execute("CREATE INDEX invoice_draft ON invoice (made_at) WHERE status = 'draft'")
    op.execute("""
        CREATE FUNCTION invoice_stays() RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE
            changing text[] := ARRAY['status', 'applied_minor', 'paid_minor', 'credited_minor'];
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
    op.execute("CREATE TRIGGER invoice_stays BEFORE UPDATE ON invoice FOR EACH ROW EXECUTE FUNCTION invoice_stays()")
    op.execute("""
        CREATE TABLE invoice_line (
            tenant_id text NOT NULL,
            invoice_id uuid NOT NULL,
            line int NOT NULL,
            line_id uuid NOT NULL,
            description text NOT NULL,
            quantity numeric NOT NULL,
            unit_nanos text NOT NULL,       -- decimal; empty: units have different prices
            amount_nanos bigint NOT NULL,
            begins timestamptz NOT NULL,
            ends timestamptz NOT NULL,
            source text NOT NULL,           -- the buckets that it sums, JSON
            PRIMARY KEY (tenant_id, invoice_id, line),
            UNIQUE (tenant_id, line_id),
            FOREIGN KEY (tenant_id, invoice_id) REFERENCES invoice
        )
    """)
    op.execute("""
        CREATE TABLE invoice_series (
            tenant_id text NOT NULL,
            series text NOT NULL,
            last bigint NOT NULL,
            PRIMARY KEY (tenant_id, series)
        )
    """)
    op.execute("""
        CREATE TABLE credit_note (
            tenant_id text NOT NULL,
            credit_note_id uuid NOT NULL,
            invoice_id uuid NOT NULL,
            number text NOT NULL,
            amount_minor bigint NOT NULL CHECK (amount_minor > 0),
            reason text NOT NULL,
            actor text NOT NULL,
            made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (tenant_id, credit_note_id),
            UNIQUE (tenant_id, number),
            FOREIGN KEY (tenant_id, invoice_id) REFERENCES invoice
        )
    """)
    op.execute("""
        CREATE TABLE buyer (
            tenant_id text PRIMARY KEY,
            name text NOT NULL,
            country text NOT NULL,
            vat_id text NOT NULL
        )
    """)
    op.execute("""
        CREATE TABLE tax_rate (
            country text NOT NULL,
            valid_from timestamptz NOT NULL,
            percent text NOT NULL,          -- decimal
            made_by text NOT NULL,
            made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (country, valid_from)
        )
    """)
    for table in ("journal_entry", "journal_line", "plan", "invoice_line", "credit_note", "tax_rate"):
        op.execute(f"REVOKE UPDATE, DELETE ON {table} FROM billing_request, billing_worker")
    for table in ("invoice", "period", "subscription", "credit_grant"):
        op.execute(f"REVOKE DELETE ON {table} FROM billing_request, billing_worker")
    op.execute("REVOKE INSERT ON plan, tax_rate FROM billing_request")
    for table in _TABLES:
        for statement in tenant_policy("billing", table):
            op.execute(statement)
