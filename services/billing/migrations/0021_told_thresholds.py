"""A budget knows the thresholds that its tenant was told of: a change of the limit repeats none and misses none."""

from alembic import op

revision = "0021"
down_revision = "0020"


def upgrade() -> None:
    op.execute("ALTER TABLE budget ADD COLUMN told_percent int[] NOT NULL DEFAULT '{}'    -- in the window")
    op.execute("""
        UPDATE budget
        SET told_percent = ARRAY(
            SELECT percent
            FROM unnest(soft_percent || 100) AS n(percent)
            WHERE nanos::numeric * percent <= spent_nanos::numeric * 100
        )
        WHERE period <> 'minute' AND spent_nanos > 0
    """)
