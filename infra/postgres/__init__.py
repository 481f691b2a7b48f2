"""PostgreSQL: transactions, event streams, outbox and inbox rows, dead letters, leases, and the kernel's own tables."""
