"""Encryption with subject keys, identities and tokens, and audit records."""
