"""Backups of a stack: the sealed file, its key, its parts, and the places that keep it."""
