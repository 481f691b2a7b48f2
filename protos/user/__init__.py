"""Calls to user, one folder per version."""
