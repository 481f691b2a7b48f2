"""Calls to the kernel of any process, one folder per version."""
