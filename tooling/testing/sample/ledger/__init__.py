"""Ledger of the sample. Owns: totals. Handles: sample.v1.NoteTaken. Calls: the front's gRPC."""
