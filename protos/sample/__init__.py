"""Calls of the sample service, by which the kernel shows and tests itself, one folder per version."""
