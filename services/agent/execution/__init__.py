"""Execution: how a worker executes one run, from its start to its outcome."""
