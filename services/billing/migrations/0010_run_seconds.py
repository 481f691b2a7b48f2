"""The price of the seconds of runs: free until the operator adds another."""

from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.execute("""
        INSERT INTO price (resource, version, currency, valid_from, prices, made_by)
        VALUES ('agent/*', 1, 'USD', '1970-01-01Z', '{"nanos":{"run_seconds":"0"},"tiers":[]}', 'genai-prices')
        ON CONFLICT DO NOTHING
    """)
