"""Learning: the agent's model finds facts about a person in the messages of a finished run."""
