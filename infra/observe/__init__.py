"""Traces, logs and metrics of a process, and the redaction of secrets in them."""
