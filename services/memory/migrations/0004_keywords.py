"""Keyword search: the words of each passage, kept by PostgreSQL in the transaction that writes the passage."""

from alembic import op

revision = "0004"
down_revision = "0003"

# Scripts without spaces between words. They are searched by pairs of neighbouring characters.
_CJK = r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]+"


def upgrade() -> None:
    op.execute(f"""
        CREATE FUNCTION keyword_pairs(text) RETURNS text[] LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
            SELECT coalesce(array_agg(DISTINCT substr(run, n, 2)), '{{}}')
            FROM regexp_matches($1, '{_CJK}', 'g') AS found (runs),
                LATERAL (SELECT found.runs[1] AS run) AS each_run,
                generate_series(1, greatest(length(run) - 1, 1)) AS n
        $$
    """)
    # A word of its own names the tenant: the index then finds the tenant's passages without a look at all others.
    op.execute("""
        CREATE FUNCTION keyword_tenant(text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
            SELECT 'tenant:' || md5($1)
        $$
    """)
    op.execute(f"""
        CREATE FUNCTION keyword_vector(tenant_id text, content text) RETURNS tsvector
        LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
            SELECT to_tsvector('pg_catalog.english', regexp_replace(content, '{_CJK}', ' ', 'g'))
                || array_to_tsvector(keyword_pairs(content) || keyword_tenant(tenant_id))
        $$
    """)
    # `joint` is ' & ' for passages with all words, ' | ' for passages with any.
    op.execute(f"""
        CREATE FUNCTION keyword_query(content text, joint text) RETURNS tsquery
        LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
            SELECT array_to_string(array_remove(ARRAY[
                replace(
                    plainto_tsquery('pg_catalog.english', regexp_replace(content, '{_CJK}', ' ', 'g'))::text,
                    ' & ',
                    joint
                ),
                (SELECT string_agg('''' || pair || '''', joint) FROM unnest(keyword_pairs(content)) AS pair)
            ], ''), joint)::tsquery
        $$
    """)
    op.execute("""
        ALTER TABLE passage ADD COLUMN words tsvector
            GENERATED ALWAYS AS (keyword_vector(tenant_id, coalesce(section, '') || ' ' || text)) STORED
    """)
    op.execute("CREATE INDEX passage_words ON passage USING gin (words)")
