"""The words of a query in every language, in one call."""

from alembic import op

revision = "0016"
down_revision = "0015"

_CJK = r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]+"


def upgrade() -> None:
    # At most `most` words, the longest ones.
    op.execute(f"""
        CREATE FUNCTION keyword_words(languages text[], content text, most int) RETURNS text[]
        LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
            WITH found AS (
                SELECT lexeme
                FROM regexp_replace(content, '{_CJK}', ' ', 'g') AS words,
                    unnest(languages) AS language,
                    unnest(to_tsvector(('pg_catalog.' || language)::regconfig, words))
                UNION
                SELECT lexeme FROM unnest(keyword_pair_vector(content))
            )
            SELECT array_agg(lexeme)
            FROM (SELECT lexeme FROM found ORDER BY length(lexeme) DESC, lexeme LIMIT most) AS longest
        $$
    """)
