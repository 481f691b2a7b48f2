"""Payments of invoices by payment providers."""
