"""Words are stemmed by the passage's language, and kept with their places, so that searches can count them.

The functions of revision 0004 stay: processes of the former version use them during a rolling restart.
"""

from alembic import op

revision = "0011"
down_revision = "0010"

_CJK = r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]+"


def upgrade() -> None:
    # Pairs of neighbouring characters, with their places: '保修':1 '修期':2.
    op.execute(f"""
        CREATE FUNCTION keyword_pair_vector(text) RETURNS tsvector LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
            SELECT coalesce(string_agg(
                '''' || substr(run, n, 2) || ''':' || least(place, 16383), ' '
            ), '')::tsvector
            FROM (
                SELECT found.runs[1] AS run, n, row_number() OVER () AS place
                FROM regexp_matches($1, '{_CJK}', 'g') AS found (runs),
                    generate_series(1, greatest(length(found.runs[1]) - 1, 1)) AS n
            ) AS pairs
        $$
    """)
    op.execute(f"""
        CREATE FUNCTION keyword_vector(tenant_id text, language text, content text) RETURNS tsvector
        LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
            SELECT to_tsvector(('pg_catalog.' || language)::regconfig, regexp_replace(content, '{_CJK}', ' ', 'g'))
                || keyword_pair_vector(content)
                || array_to_tsvector(ARRAY[keyword_tenant(tenant_id)])
        $$
    """)
    # Any of these words.
    op.execute(r"""
        CREATE FUNCTION keyword_any(words text[]) RETURNS tsquery LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
            SELECT coalesce(string_agg(
                '''' || replace(replace(word, '\', '\\'), '''', '''''') || '''', ' | '
            ), '')::tsquery
            FROM unnest(words) AS word
        $$
    """)
    op.execute("ALTER TABLE passage ADD COLUMN language text NOT NULL DEFAULT 'english'")
    # Writes the table again and locks it meanwhile: half a minute for 100,000 passages.
    op.execute("ALTER TABLE passage DROP COLUMN words")
    op.execute("""
        ALTER TABLE passage ADD COLUMN words tsvector
            GENERATED ALWAYS AS (keyword_vector(tenant_id, language, coalesce(section, '') || ' ' || text)) STORED
    """)
    # Without the list of pending entries, which each of a search's many look-ups would read.
    op.execute("CREATE INDEX passage_words ON passage USING gin (words) WITH (fastupdate = off)")
