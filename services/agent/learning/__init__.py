"""Learning: what the agent's model finds about a person in the messages of a finished run."""
