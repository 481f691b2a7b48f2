"""Tables of documents and their passages. Milvus holds the index of the vectors, one collection per model."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.execute("""
        CREATE TABLE document (
            id uuid PRIMARY KEY,
            tenant_id text NOT NULL,
            name text NOT NULL,
            content_type text NOT NULL,
            size bigint NOT NULL,
            sha256 text NOT NULL,
            path text NOT NULL,                 -- the key in the object store
            status text NOT NULL CHECK (status IN ('stored', 'parsed', 'chunked', 'embedded', 'indexed', 'failed')),
            progress real NOT NULL DEFAULT 0,   -- 0 to 1
            error text,
            created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            deleted_at timestamptz              -- hidden from everyone; a lane item removes the rest
        )
    """)
    op.execute("CREATE INDEX document_list ON document (tenant_id, created_at, id) WHERE deleted_at IS NULL")
    op.execute("""
        CREATE TABLE passage (
            id uuid PRIMARY KEY,
            tenant_id text NOT NULL,
            document_id uuid NOT NULL REFERENCES document ON DELETE CASCADE,
            n int NOT NULL,                     -- from 0, in the order of the document
            text text NOT NULL,
            section text,
            page int,
            model text,                         -- the embedding model of the vector
            vector bytea,                       -- little-endian float32; the source for the index
            UNIQUE (document_id, n),
            CHECK ((model IS NULL) = (vector IS NULL))
        )
    """)
    for table in ("document", "passage"):
        for statement in tenant_policy("memory", table):
            op.execute(statement)
