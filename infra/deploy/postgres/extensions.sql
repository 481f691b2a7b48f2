-- The image runs this once when it makes the database: only a superuser may add extensions.
CREATE EXTENSION vector;
CREATE EXTENSION pg_trgm;
