"""Above the services: the command line, the local stack of engines, benches and test support."""
