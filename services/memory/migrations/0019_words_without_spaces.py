"""Thai, Lao, Burmese and Khmer have no spaces between words either: they are searched by pairs of characters, too.

Before, each phrase was one word, and only the whole phrase found it.
"""

from alembic import op

revision = "0019"
down_revision = "0018"

_ADDED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_WITHOUT_SPACES = rf"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff{_ADDED}]+"


def upgrade() -> None:
    op.execute(f"""
        CREATE OR REPLACE FUNCTION keyword_pair_vector(text) RETURNS tsvector LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
            SELECT coalesce(string_agg(
                '''' || substr(run, n, 2) || ''':' || least(place, 16383), ' '
            ), '')::tsvector
            FROM (
                SELECT found.runs[1] AS run, n, row_number() OVER () AS place
                FROM regexp_matches($1, '{_WITHOUT_SPACES}', 'g') AS found (runs),
                    generate_series(1, greatest(length(found.runs[1]) - 1, 1)) AS n
            ) AS pairs
        $$
    """)
    op.execute(f"""
        CREATE OR REPLACE FUNCTION keyword_vector(tenant_id text, language text, content text) RETURNS tsvector
        LANGUAGE sql IMMUTABLE PARALLEL SAFE
        RETURN to_tsvector(
                ('pg_catalog.' || language)::regconfig, regexp_replace(content, '{_WITHOUT_SPACES}', ' ', 'g')
            )
            || keyword_pair_vector(content)
            || array_to_tsvector(ARRAY[keyword_tenant(tenant_id)])
    """)
    op.execute(f"""
        CREATE OR REPLACE FUNCTION keyword_words(languages text[], content text, most int) RETURNS text[]
        LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
            WITH found AS (
                SELECT lexeme
                FROM regexp_replace(content, '{_WITHOUT_SPACES}', ' ', 'g') AS words,
                    unnest(languages) AS language,
                    unnest(to_tsvector(('pg_catalog.' || language)::regconfig, words))
                UNION
                SELECT lexeme FROM unnest(keyword_pair_vector(content))
            )
            SELECT array_agg(lexeme)
            FROM (SELECT lexeme FROM found ORDER BY length(lexeme) DESC, lexeme LIMIT most) AS longest
        $$
    """)
    # PostgreSQL computes the words of a passage again when its text is written.
    op.execute(f"UPDATE passage SET text = text WHERE text ~ '[{_ADDED}]' OR section ~ '[{_ADDED}]'")
