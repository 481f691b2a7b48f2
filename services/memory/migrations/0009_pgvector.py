"""The index in PostgreSQL, and the choice of the engine."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE index_row (
            tenant_id text NOT NULL,
            model text NOT NULL,                -- the embedding model
            scope text NOT NULL,                -- document, or the session of a reply
            owner_id uuid NOT NULL,
            text_id uuid NOT NULL,
            vector public.vector NOT NULL,
            PRIMARY KEY (tenant_id, model, owner_id, text_id)
        )
    """)
    op.execute("CREATE INDEX index_row_scope ON index_row (tenant_id, model, scope)")
    for statement in tenant_policy("memory", "index_row"):
        op.execute(statement)
    # The owner's right: the service's own roles cannot make indexes.
    op.execute("""
        CREATE FUNCTION index_large_tenant(tenant text, embedding text, wanted_scope text) RETURNS boolean
        LANGUAGE plpgsql SECURITY DEFINER SET search_path = memory, public AS $$
        DECLARE
            index_name text := 'index_row_' || md5(concat_ws(chr(10), tenant, embedding, wanted_scope));
            dimension int;
        BEGIN
            IF to_regclass('memory.' || index_name) IS NOT NULL THEN
                RETURN false;
            END IF;
            SELECT public.vector_dims(vector) INTO dimension
            FROM index_row
            WHERE tenant_id = tenant AND model = embedding AND scope = wanted_scope
            LIMIT 1;
            IF dimension IS NULL THEN
                RETURN false;
            END IF;
            -- Locks the table against writes until the commit, not against searches.
            EXECUTE format(
                'CREATE INDEX %I ON index_row USING hnsw ((vector::public.vector(%s)) public.vector_cosine_ops) '
                'WITH (m = 16, ef_construction = 64) WHERE tenant_id = %L AND model = %L AND scope = %L',
                index_name, dimension, tenant, embedding, wanted_scope
            );
            RETURN true;
        END
        $$
    """)
    op.execute("REVOKE ALL ON FUNCTION index_large_tenant FROM PUBLIC, memory_request")
    op.execute("""
        CREATE TABLE index_engine (
            one boolean PRIMARY KEY DEFAULT true CHECK (one),
            reading text NOT NULL CHECK (reading IN ('milvus', 'pgvector')),    -- searches look there
            filling text[] NOT NULL CHECK (reading = ANY(filling))              -- every document goes there
        )
    """)
    op.execute("INSERT INTO index_engine (reading, filling) VALUES ('milvus', '{milvus}')")
