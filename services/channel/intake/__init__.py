"""Vendors' calls: verified, accepted, and drained into their conversations."""
