"""Redis channels that one service publishes to and another one listens to; no message on them is kept."""

RUN_DELTAS = "claw:run:"
"""The channel is this prefix and the run's id. Agent publishes the text of an answer while the model writes it, as
``{"step", "attempt", "n", "text"}``; ws gateway listens."""

RUN_PROGRESS = "claw:progress"
"""Agent publishes, while it executes a run that came from a channel for longer than two seconds, that it is at work
and the text so far, as ``{"run_id", "session_key", "text"}``; channel listens."""
