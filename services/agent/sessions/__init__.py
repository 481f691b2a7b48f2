"""Sessions: conversations with an agent, and the messages that come in."""
