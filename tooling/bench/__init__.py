"""Benches: what the kernel does, as a ratio to the same durable work done by hand, on real engines.

``./claw bench``. Absolute figures depend on the machine; the ratios of paired slices do not, much.
"""
