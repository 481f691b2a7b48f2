"""Invoices: closed periods, taxes, bookings, files and mails."""
