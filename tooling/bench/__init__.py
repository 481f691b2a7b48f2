"""Benches (``./claw bench``): our rate as a ratio to the rate of the same durable work done by hand, on real engines.

Absolute figures depend on the machine. The ratios of paired slices hardly do.
"""
