"""The agent service of the runs bench."""

TOOL = "calculator"
