"""Apache Kafka: one node in KRaft mode, without authentication, and therefore on loopback only."""

from __future__ import annotations

import subprocess
from typing import Any

from tooling.stack.engines.base import ANSWER_SECONDS, EngineError, Place, Program, fresh_folder, write_atomically
from tooling.stack.engines.jars import JAVA, install_jars

NAME = "kafka"
PORTS = {"kafka": 9092, "kafka_controller": 9093}
_VERSION = "4.1.0"
_CLUSTER_ID = "Y2xhd2J1cy1sb2NhbC0wMQ"
_READY_TOPIC = "claw.ready"


def install() -> None:
    install_jars(NAME)


def prepare(place: Place) -> None:
    folder = place.folder(NAME)
    data = folder / "data"
    if not data.exists():
        fresh = fresh_folder(data)
        configuration = _configure(place, str(fresh))
        command = [*_java("-Xmx128m"), "kafka.tools.StorageTool", "format"]
        done = subprocess.run(
            [*command, "-t", _CLUSTER_ID, "-c", configuration], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise EngineError(
                f"could not format the data folder of Kafka: {done.stderr.strip() or done.stdout.strip()}"
            )
        fresh.rename(data)
    _configure(place, str(data))


def program(place: Place) -> Program:
    folder = place.folder(NAME)
    logging = f"-Dlog4j2.configurationFile={folder}/log4j2.properties"
    return Program((*_java("-Xms128m", "-Xmx384m", logging), "kafka.Kafka", str(folder / "server.properties")))


async def ready(place: Place) -> str:
    """Writes a record to a topic of its own and reads it back."""
    from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
    from aiokafka.admin import AIOKafkaAdminClient, NewTopic

    servers = access(place)["bootstrap_servers"]
    admin = AIOKafkaAdminClient(bootstrap_servers=servers, request_timeout_ms=ANSWER_SECONDS * 1000)
    try:
        await admin.start()
        if _READY_TOPIC not in await admin.list_topics():
            limits = {"retention.ms": "60000", "segment.bytes": "1048576"}
            await admin.create_topics([NewTopic(_READY_TOPIC, 1, 1, topic_configs=limits)])
    finally:
        await admin.close()
    async with AIOKafkaProducer(bootstrap_servers=servers, request_timeout_ms=ANSWER_SECONDS * 1000) as producer:
        sent = await producer.send_and_wait(_READY_TOPIC, b"ready", partition=0)
    async with AIOKafkaConsumer(bootstrap_servers=servers, request_timeout_ms=ANSWER_SECONDS * 1000) as consumer:
        partition = TopicPartition(_READY_TOPIC, 0)
        consumer.assign([partition])
        consumer.seek(partition, sent.offset)
        await consumer.getone()
    return _VERSION


def access(place: Place) -> dict[str, Any]:
    return {"bootstrap_servers": f"127.0.0.1:{place.ports['kafka']}"}


def _java(*options: str) -> tuple[str, ...]:
    return (*JAVA, *options, "-cp", f"{install_jars(NAME)}/*")


def _configure(place: Place, data: str) -> str:
    """Writes the configuration and returns its path. Kafka's defaults decide when it flushes."""
    broker, controller = place.ports["kafka"], place.ports["kafka_controller"]
    settings = {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@127.0.0.1:{controller}",
        "listeners": f"PLAINTEXT://127.0.0.1:{broker},CONTROLLER://127.0.0.1:{controller}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{broker}",
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
        "log.dirs": data,
        # Otherwise a misspelt topic would become a new topic with one partition, instead of an error.
        "auto.create.topics.enable": "false",
        "offsets.topic.num.partitions": "8",
        "offsets.topic.replication.factor": "1",
        "transaction.state.log.num.partitions": "4",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        "group.initial.rebalance.delay.ms": "0",
        # Tests use short sessions.
        "group.min.session.timeout.ms": "1000",
    }
    folder = place.folder(NAME)
    path = folder / "server.properties"
    write_atomically(path, "".join(f"{name}={value}\n" for name, value in settings.items()))
    logging = (
        "appender.out.type=Console\nappender.out.name=out\nappender.out.layout.type=PatternLayout\n"
        "appender.out.layout.pattern=%d %p %c{1} %m%n\nrootLogger.level=WARN\nrootLogger.appenderRef.out.ref=out\n"
    )
    write_atomically(folder / "log4j2.properties", logging)
    return str(path)
