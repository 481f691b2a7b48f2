"""The engines of the local stack, each a module with the face of `base.Engine`."""

from tooling.stack.engines import kafka, mailbox, milvus, nginx, opensearch, postgres, rabbitmq, s3, valkey
from tooling.stack.engines.base import Engine

ENGINES: dict[str, Engine] = {
    engine.NAME: engine for engine in (postgres, valkey, kafka, rabbitmq, milvus, s3, opensearch, nginx, mailbox)
}
# What credentials.json calls an engine, where that is not its name.
CREDENTIALS = {name: {"valkey": "redis"}.get(name, name) for name in ENGINES}
