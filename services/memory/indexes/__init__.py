"""Vectors: the models that make them, and the indexes that find the nearest ones."""
