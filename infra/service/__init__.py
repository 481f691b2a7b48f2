"""A service process: settings, start and stop, its HTTP API, operations, maintenance, redrive and replay."""
