"""Words are found without their accents (Malmo, eleves), vowel points and Hebrew or Arabic prefixes, and if signs join
them to others: pump/valve and leaks.The were one word for PostgreSQL, and XK-4711 has the negative number -4711. Codes
are found without their hyphens (XK4711).

As they are written they are words, too, so a query with the accents finds these first.
"""

from alembic import op

revision = "0021"
down_revision = "0020"

_WITHOUT_SPACES = r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]+"
# Accents, Hebrew and Arabic vowel points. Not those of Indian scripts, which are letters.
_POINTS = r"[\u0300-\u036f\u0591-\u05bd\u05bf-\u05c7\u0640\u064b-\u0655\u0670]"
_JOINED = "[[:alnum:]][/.@][[:alnum:]]"
# Words of other letters, and numbers with a sign. The others have no forms, and are most of the words.
_HAS_FORMS = r"lexeme ~ '[^\x01-\x7f]|^[-+]\d'"


def upgrade() -> None:
    # The forms of a word that differ from it.
    op.execute(rf"""
        CREATE FUNCTION keyword_forms(word text) RETURNS text[] LANGUAGE sql IMMUTABLE PARALLEL SAFE
        RETURN ARRAY(
            SELECT DISTINCT form
            FROM (
                SELECT normalize(
                    regexp_replace(
                        normalize(replace(replace(translate(word, 'łøđıς', 'lodiσ'), 'ß', 'ss'), 'æ', 'ae'), NFD),
                        '{_POINTS}', '', 'g'
                    ),
                    NFC
                )
                OFFSET 0
            ) AS bare (plain),
                LATERAL unnest(ARRAY[
                    plain,
                    regexp_replace(plain, '^[-+](?=\d)', ''),
                    regexp_replace(plain, '^[ובהכלמש](?=[א-ת]{{3}})', ''),
                    regexp_replace(plain, '^[ובהכלמש]{{2}}(?=[א-ת]{{3}})', ''),
                    regexp_replace(plain, '^(?:[وفبك]?ال|لل)(?=[ء-ي]{{3}})', '')
                ]) AS form
            WHERE form NOT IN (word, '')
        )
    """)
    # The forms of all words, at their places.
    op.execute(rf"""
        CREATE FUNCTION keyword_form_vector(words tsvector) RETURNS tsvector LANGUAGE sql IMMUTABLE PARALLEL SAFE
        RETURN (
            SELECT coalesce(string_agg(
                '''' || replace(replace(form, '\', '\\'), '''', '''''') || ''':' || array_to_string(positions, ','), ' '
            ), '')::tsvector
            FROM unnest(words) AS word (lexeme, positions, weights), unnest(keyword_forms(lexeme)) AS form
            WHERE {_HAS_FORMS}
        )
    """)
    # The parts of joined words: the text "pump valve" of "a pump/valve, 12.5 kg".
    op.execute(rf"""
        CREATE FUNCTION keyword_parts(content text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
        RETURN (
            SELECT coalesce(string_agg(regexp_replace(word, '[/.@?=&]+', ' ', 'g'), ' '), '')
            FROM regexp_split_to_table(content, '\s+') AS word
            WHERE word ~ '{_JOINED}' AND word ~ '[[:alpha:]/]'
        )
    """)
    op.execute(f"""
        CREATE OR REPLACE FUNCTION keyword_vector(tenant_id text, language text, content text) RETURNS tsvector
        LANGUAGE sql IMMUTABLE PARALLEL SAFE
        RETURN (
            SELECT found.words || keyword_form_vector(found.words)
            FROM (
                SELECT to_tsvector(('pg_catalog.' || language)::regconfig, spaced.content)
                    || to_tsvector(('pg_catalog.' || language)::regconfig, keyword_parts(spaced.content))
                FROM (SELECT regexp_replace(content, '{_WITHOUT_SPACES}', ' ', 'g') OFFSET 0) AS spaced (content)
                OFFSET 0
            ) AS found (words)
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
                    unnest(to_tsvector(('pg_catalog.' || language)::regconfig, words || ' ' || keyword_parts(words)))
                UNION
                SELECT lexeme FROM unnest(keyword_pair_vector(content))
            ), formed AS (
                SELECT lexeme FROM found
                UNION
                SELECT form FROM found, unnest(keyword_forms(lexeme)) AS form WHERE {_HAS_FORMS}
            )
            SELECT array_agg(lexeme)
            FROM (SELECT lexeme FROM formed ORDER BY length(lexeme) DESC, lexeme LIMIT most) AS longest
        $$
    """)
    # PostgreSQL computes the words of a passage again when its text is written.
    op.execute(rf"""
        UPDATE passage
        SET text = text,
            codes = ARRAY(
                SELECT DISTINCT form
                FROM unnest(codes) AS code, unnest(ARRAY[code, translate(code, '-_', '')]) AS form
                WHERE form !~ '^\d{{1,2}}$'
                ORDER BY form
            )
        WHERE concat(section, ' ', text) ~ '[^\x01-\x7f]|{_JOINED}|[-+]\d|\w[-_]\w'
    """)
