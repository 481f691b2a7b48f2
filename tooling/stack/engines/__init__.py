"""The engines of the local stack. Each is a module that implements the protocol `base.Engine`."""

from tooling.stack.engines import kafka, mailbox, milvus, nginx, opensearch, postgres, rabbitmq, s3, valkey
from tooling.stack.engines.base import Engine

ENGINES: dict[str, Engine] = {
    engine.NAME: engine for engine in (postgres, valkey, kafka, rabbitmq, milvus, s3, opensearch, nginx, mailbox)
}
# Engine → its name in credentials.json.
CREDENTIALS = {name: {"valkey": "redis"}.get(name, name) for name in ENGINES}
