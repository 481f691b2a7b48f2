"""Three small services that use all of the kernel: front (HTTP, gRPC), desk (RabbitMQ → stream), ledger (Kafka).

Demo, crash tests and benches run on them. They are real processes on real engines, but not part of the product.
"""
