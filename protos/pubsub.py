"""Redis channels that one service publishes to and another one listens to; no message on them is kept."""

RUN_DELTAS = "claw:run:"
"""The channel is this prefix and the run's id. Agent publishes the text of an answer while the model writes it, as
``{"step", "attempt", "n", "text"}``; ws gateway listens."""
