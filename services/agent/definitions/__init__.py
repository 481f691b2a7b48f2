"""Agents as they are set up: each change is a new version, and a run keeps to the one it began with."""
