"""The embedding models in use, and a second vector of each text: a new model embeds everything beside the old one."""

from alembic import op

revision = "0018"
down_revision = "0017"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE embedding_model (
            key text PRIMARY KEY,               -- the name of its vectors
            name text NOT NULL,                 -- as the endpoint knows it
            base_url text,                      -- of the endpoint; NULL: the model in the process
            sealed_api_key bytea NOT NULL,      -- empty: none
            state text NOT NULL CHECK (state IN ('active', 'target', 'former')),
            since timestamptz NOT NULL DEFAULT clock_timestamp(),   -- of the state
            error text,                         -- of the target: the last one, if it has not worked since
            failed_at timestamptz
        )
    """)
    op.execute("CREATE UNIQUE INDEX embedding_model_state ON embedding_model (state) WHERE state <> 'former'")
    op.execute("REVOKE ALL ON embedding_model FROM memory_request")
    for table in ("passage", "utterance", "memory"):
        op.execute(f"""
            ALTER TABLE {table}
                ADD COLUMN other_model text,
                ADD COLUMN other_vector bytea,
                ADD CHECK ((other_model IS NULL) = (other_vector IS NULL))
        """)
    op.execute("ALTER TABLE utterance ADD COLUMN indexed_in text[] NOT NULL DEFAULT '{}'")
