"""The command line: the layer above the services."""
