"""Channel accounts: their credentials and settings, and which agent gets a message."""
