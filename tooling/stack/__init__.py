"""The local stack: engines, ports, passwords, users, provisioning and supervision."""
