"""Prices of the platform's own meters: free until the operator adds others."""

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.execute("""
        INSERT INTO price (resource, version, currency, valid_from, prices, made_by)
        VALUES
            ('memory/*', 1, 'USD', '1970-01-01Z', '{"nanos":{"documents":"0","storage_byte_hours":"0"},"tiers":[]}',
             'genai-prices')
        ON CONFLICT DO NOTHING
    """)
