"""Streams of events in PostgreSQL: append by compare-and-set, upcasting on read, replay of projections."""
