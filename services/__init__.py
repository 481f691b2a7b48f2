"""The services. One folder is one process, one consumer group, one database schema. No service imports another one."""
