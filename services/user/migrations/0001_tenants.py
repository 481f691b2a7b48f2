"""Tables of tenants, members and API keys."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.execute("""
        CREATE TABLE tenant (
            tenant_id text PRIMARY KEY,
            name text NOT NULL,
            currency text NOT NULL,
            created_at timestamptz NOT NULL DEFAULT clock_timestamp()
        )
    """)
    # email and name are sealed with the key of the subject whose id is the member's.
    op.execute("""
        CREATE TABLE member (
            id uuid PRIMARY KEY,
            tenant_id text NOT NULL REFERENCES tenant,
            role text NOT NULL CHECK (role IN ('owner', 'admin', 'operator', 'viewer')),
            email bytea NOT NULL,
            name bytea,
            created_at timestamptz NOT NULL DEFAULT clock_timestamp()
        )
    """)
    op.execute("CREATE INDEX member_tenant ON member (tenant_id, id)")
    # hash: SHA-256 of the plaintext, which is not stored. A member's keys are deleted with the member.
    op.execute("""
        CREATE TABLE api_key (
            id uuid PRIMARY KEY,
            tenant_id text NOT NULL REFERENCES tenant,
            member_id uuid REFERENCES member ON DELETE CASCADE,
            name text NOT NULL,
            prefix text NOT NULL,
            hash bytea NOT NULL UNIQUE,
            scopes text[] NOT NULL,
            created_by text NOT NULL,
            created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            expires_at timestamptz
        )
    """)
    op.execute("CREATE INDEX api_key_tenant ON api_key (tenant_id, id)")
    op.execute("CREATE INDEX api_key_member ON api_key (member_id) WHERE member_id IS NOT NULL")
    for table in ("tenant", "member", "api_key"):
        for statement in tenant_policy("user", table):
            op.execute(statement)
