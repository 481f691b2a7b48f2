"""Desk of the sample. Owns: notebooks. Handles: sample.v1.TakeNote. Publishes: sample.v1.NoteTaken."""
