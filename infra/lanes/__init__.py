"""Lanes: work that is long, ordered or delayed, done one item at a time per lane across all processes."""
