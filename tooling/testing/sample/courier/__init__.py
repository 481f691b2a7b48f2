"""Courier of the sample. Owns: deliveries. Works on: parcels, one lane per street. Calls: the office's HTTP."""
