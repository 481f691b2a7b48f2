"""Stores beside PostgreSQL: the cache (Redis) and the object store (S3). Neither is the truth."""
