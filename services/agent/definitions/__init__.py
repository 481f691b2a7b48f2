"""Definitions of agents. Each change is a new version, and a run keeps the version it began with."""
