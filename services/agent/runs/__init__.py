"""Runs: one execution of an agent, which answers one or more messages of a session."""
