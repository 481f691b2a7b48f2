-- Run once, by the image, when the database is made: only a superuser may do this.
CREATE EXTENSION vector;
CREATE EXTENSION pg_trgm;
