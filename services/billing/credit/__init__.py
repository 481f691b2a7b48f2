"""Accounts, the journal, grants, holds and budgets."""
