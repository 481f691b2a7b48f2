"""The two buses, each plain about its broker: Kafka carries facts, RabbitMQ carries work."""
