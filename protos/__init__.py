"""Contracts: all that services know of each other. Imports nothing of infra or services."""
