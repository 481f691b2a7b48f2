"""Services that use all of the kernel: front (HTTP, gRPC), desk (RabbitMQ → stream), ledger (Kafka), courier (lane).

Crash tests and benches run them as real processes on real engines. They are not part of the product.
"""
