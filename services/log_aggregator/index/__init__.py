"""The search index: its documents, their fields and saved searches, and the comparison with the topics."""
