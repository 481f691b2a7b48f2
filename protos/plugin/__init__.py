"""Calls to plugin, one folder per version."""
