"""Courier of the sample. Owns: deliveries. Works off: parcels, a lane per street. Calls: the office's HTTP."""
