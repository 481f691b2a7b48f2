"""Replies on their way to the vendor: queued, sent in order, shown while they are written."""
