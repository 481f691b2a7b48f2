"""Audit chains: records that are linked by hashes, their heads in the object store, and their verification."""
