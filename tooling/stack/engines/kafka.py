"""Apache Kafka: one node in KRaft mode, on loopback only. It asks for a login only if the stack uses TLS."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

from infra.connections import SCRAM, TLS_FILES, kafka_options
from tooling.stack.engines import certificates
from tooling.stack.engines.base import (
    ANSWER_SECONDS,
    EngineError,
    Place,
    Program,
    complete,
    fresh_folder,
    write_atomically,
)
from tooling.stack.engines.jars import JAVA, console_log, install_jars

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
    # Java unpacks libraries into it and deletes them at its end, unless it is killed.
    shutil.rmtree(folder / "temp", ignore_errors=True)
    (folder / "temp").mkdir()
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
        complete(fresh, data)
    _configure(place, str(data))


def program(place: Place) -> Program:
    folder = place.folder(NAME)
    options = ("-Xms128m", "-Xmx384m", f"-Dlog4j2.configurationFile={folder}/log4j2.properties")
    command = _java(*options, f"-Djava.io.tmpdir={folder}/temp")
    return Program((*command, "kafka.Kafka", str(folder / "server.properties")))


async def ready(place: Place) -> str:
    """Writes a record to a topic of its own and reads it back."""
    from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
    from aiokafka.admin import AIOKafkaAdminClient, NewTopic

    options = kafka_options(access(place)["bootstrap_servers"]) | {"request_timeout_ms": ANSWER_SECONDS * 1000}
    admin = AIOKafkaAdminClient(**options)
    try:
        await admin.start()
        if _READY_TOPIC not in await admin.list_topics():
            limits = {"retention.ms": "60000", "segment.bytes": "1048576"}
            await admin.create_topics([NewTopic(_READY_TOPIC, 1, 1, topic_configs=limits)])
    finally:
        await admin.close()
    async with AIOKafkaProducer(**options) as producer:
        sent = await producer.send_and_wait(_READY_TOPIC, b"ready", partition=0)
    async with AIOKafkaConsumer(**options) as consumer:
        partition = TopicPartition(_READY_TOPIC, 0)
        consumer.assign([partition])
        consumer.seek(partition, sent.offset)
        await consumer.getone()
    return _VERSION


def access(place: Place) -> dict[str, Any]:
    address = f"127.0.0.1:{place.ports['kafka']}"
    if not (query := certificates.query(place, NAME, certificates.ADMIN)):
        return {"bootstrap_servers": address}
    password = place.secret("kafka.admin")
    return {"bootstrap_servers": f"kafkas://admin:{password}@{address}{query}&mechanism=PLAIN"}


def _open() -> dict[str, str]:
    return {"listener.security.protocol.map": "CONTROLLER:PLAINTEXT,CLIENT:PLAINTEXT"}


def _secured(place: Place) -> dict[str, str]:
    """Mutual TLS on both listeners. Clients also log in: the administrator by the password that stands here, the
    services by SCRAM, with the accounts and rights that the provisioning makes."""
    own = certificates.folder(place, NAME)
    authority, certificate, key = (own / name for name in TLS_FILES)
    # Kafka reads key and certificate from one file.
    write_atomically(own / "keystore.pem", key.read_text() + certificate.read_text())
    password = place.secret("kafka.admin")
    login = "org.apache.kafka.common.security.plain.PlainLoginModule required"
    scram = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
    return {
        "listener.security.protocol.map": "CONTROLLER:SSL,CLIENT:SASL_SSL",
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(own / "keystore.pem"),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(authority),
        "ssl.client.auth": "required",
        "listener.name.client.ssl.client.auth": "required",
        "sasl.mechanism.inter.broker.protocol": "PLAIN",
        "listener.name.client.sasl.enabled.mechanisms": f"PLAIN,{SCRAM}",
        "listener.name.client.plain.sasl.jaas.config": (
            f'{login} username="admin" password="{password}" user_admin="{password}";'
        ),
        f"listener.name.client.{SCRAM.lower()}.sasl.jaas.config": scram,
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        # The node itself on the controller's listener, and the administrator.
        "super.users": f"User:CN={NAME};User:admin",
    }


def _java(*options: str) -> tuple[str, ...]:
    # Otherwise Java warns at each start of a method that Kafka calls.
    return (*JAVA, "--sun-misc-unsafe-memory-access=allow", *options, "-cp", f"{install_jars(NAME)}/*")


def _configure(place: Place, data: str) -> str:
    """Writes the configuration and returns its path."""
    broker, controller = place.ports["kafka"], place.ports["kafka_controller"]
    settings = {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@127.0.0.1:{controller}",
        "listeners": f"CLIENT://127.0.0.1:{broker},CONTROLLER://127.0.0.1:{controller}",
        "advertised.listeners": f"CLIENT://127.0.0.1:{broker}",
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "CLIENT",
        **(_secured(place) if certificates.in_use(place) else _open()),
        "log.dirs": data,
        # A record is on the disk before it is confirmed. By default the system writes it out seconds later, and there
        # is no replica: a power cut would lose records that the outbox has marked as published.
        "log.flush.interval.messages": "1",
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
    # Of an error, its first cause and three lines of the trace. `up` shows the last lines only.
    write_atomically(folder / "log4j2.properties", console_log("%d %p %c{1} %m %rEx{4}%n"))
    return str(path)
