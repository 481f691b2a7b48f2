"""The agent service of the intake bench."""
