"""Calls to memory, one folder per version."""
