"""Topics: the differences between catalog and broker, and the changes that remove them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from aiokafka.admin import NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from infra.bus.kafka import MAX_RECORD_BYTES
from infra.bus.provisioning.drift import Drift, ProvisioningError, extra, fixable, refused
from protos.topology import Topic

_PARTITIONS = (
    "another number moves keys to other partitions and breaks their order; drain the topic's consumers, then delete "
    "and create the topic, or add partitions by hand"
)
_SET_ON_TOPIC = 1
_TOPIC_EXISTS = 36


def topic_config(topic: Topic, brokers: int) -> dict[str, str]:
    """The settings of a topic that may differ from the broker's defaults."""
    retention_ms = int(topic.retention.total_seconds() * 1000)
    return {
        "cleanup.policy": "delete",
        "retention.ms": str(retention_ms),
        # A record is deleted with the last one of its segment: at most an eighth of the retention time too late.
        "segment.ms": str(retention_ms // 8),
        # The broker's clock: time lag and retention must not depend on the clocks of the producers. The record's
        # ce_time has the time of the event.
        "message.timestamp.type": "LogAppendTime",
        # One record with its headers. Larger content belongs in the object store.
        "max.message.bytes": str(MAX_RECORD_BYTES + 64 * 1024),
        # acks=all waits for this number of copies. With one copy, acknowledged records are lost with their broker.
        "min.insync.replicas": "2" if brokers >= 3 else "1",
    }


class Topics:
    """The topics of one Kafka cluster whose names begin with `prefix`."""

    def __init__(self, admin: Any, prefix: str) -> None:
        self._admin = admin
        self._prefix = prefix

    async def drift(self, topics: Sequence[Topic]) -> list[Drift]:
        found = await self._partitions()
        brokers = await self._brokers()
        config = await self._config(topic.name for topic in topics if topic.name in found)
        drifts = []
        for topic in topics:
            subject = f"topic {topic.name}"
            if topic.name not in found:
                wanted = f"{topic.partitions} partitions"
                drifts.append(fixable(subject, "topic", wanted=wanted, found="-", reason="is created"))
                continue
            if (there := found[topic.name]) != topic.partitions:
                drifts.append(refused(subject, "partitions", wanted=topic.partitions, found=there, reason=_PARTITIONS))
            for key, value in topic_config(topic, brokers).items():
                if (set_to := config[topic.name][key]) != value:
                    reason = "is set; if shorter, older records go" if key == "retention.ms" else "is set"
                    drifts.append(fixable(subject, key, wanted=value, found=set_to, reason=reason))
        unknown = found.keys() - {topic.name for topic in topics}
        return drifts + [extra(f"topic {name}", "topic") for name in sorted(unknown)]

    async def mend(self, topics: Sequence[Topic], subjects: set[str]) -> None:
        found = await self._partitions()
        brokers = await self._brokers()
        drifted = [topic for topic in topics if f"topic {topic.name}" in subjects]
        missing = [
            NewTopic(
                self._prefix + topic.name,
                topic.partitions,
                min(3, brokers),
                topic_configs=topic_config(topic, brokers),
            )
            for topic in drifted
            if topic.name not in found
        ]
        if missing:
            # The call does not raise if one topic fails. If another process was quicker, its topic is read back.
            response = await self._admin.create_topics(missing)
            for name, code, message in response.topic_errors:
                if code not in (0, _TOPIC_EXISTS):
                    raise ProvisioningError(f"Kafka did not create topic {name}: {message} (code {code})")
        altered = [topic for topic in drifted if topic.name in found]
        others = await self._config((topic.name for topic in altered), source=_SET_ON_TOPIC)
        for topic in altered:
            # The request replaces all settings of the topic, so it must repeat those that other programs have set.
            values = others[topic.name] | topic_config(topic, brokers)
            resource = ConfigResource(ConfigResourceType.TOPIC, self._prefix + topic.name, values)
            for response in await self._admin.alter_configs([resource]):
                for code, message, *_ in response.resources:
                    if code:
                        raise ProvisioningError(f"Kafka did not set {topic.name}: {message} (code {code})")

    async def _partitions(self) -> dict[str, int]:
        return {
            str(row["topic"]).removeprefix(self._prefix): len(row["partitions"])
            for row in await self._admin.describe_topics()
            if not row["is_internal"] and str(row["topic"]).startswith(self._prefix)
        }

    async def _brokers(self) -> int:
        return len((await self._admin.describe_cluster())["brokers"])

    async def _config(self, names: Iterable[str], source: int | None = None) -> dict[str, dict[str, str]]:
        resources = [ConfigResource(ConfigResourceType.TOPIC, self._prefix + name) for name in names]
        result = {}
        for response in await self._admin.describe_configs(resources):
            for code, message, _, topic, entries in response.resources:
                if code:
                    raise ProvisioningError(f"Kafka did not return the settings of {topic}: {message} (code {code})")
                result[str(topic).removeprefix(self._prefix)] = {
                    name: value for name, value, _, of, *_ in entries if source in (None, of)
                }
        return result
