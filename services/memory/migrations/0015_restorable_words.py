"""A dump of the table of passages can be restored.

pg_restore sets no search path, and a generated column calls its function while rows are restored. A body that
PostgreSQL parses at once refers to the other functions themselves, and not to their names.
"""

from alembic import op

revision = "0015"
down_revision = "0014"

_CJK = r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]+"


def upgrade() -> None:
    op.execute(f"""
        CREATE OR REPLACE FUNCTION keyword_vector(tenant_id text, language text, content text) RETURNS tsvector
        LANGUAGE sql IMMUTABLE PARALLEL SAFE
        RETURN to_tsvector(('pg_catalog.' || language)::regconfig, regexp_replace(content, '{_CJK}', ' ', 'g'))
            || keyword_pair_vector(content)
            || array_to_tsvector(ARRAY[keyword_tenant(tenant_id)])
    """)
