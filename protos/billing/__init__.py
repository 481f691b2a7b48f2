"""Calls to billing, one folder per version."""
