"""The services: one folder is one process, one consumer group and one database schema. None imports another."""
