"""Contracts: everything that services know of each other. Imports nothing from infra or services."""
