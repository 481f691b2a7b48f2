"""Every topic and queue of the system, with producers, consumers, messages, retention and retries.

No other module names a topic or queue: provisioning, the AsyncAPI document and ``claw map`` read this one. A consumer
of a topic keeps its dead letters in its own table; a queue also has a dead letter queue, ``<name>.dlq``.
"""

from __future__ import annotations

from datetime import timedelta

from protos.messages import agent, audit, billing, channel, logs, memory, notification, plugin, user
from protos.topology import Catalog, Exchange, Queue, Topic

SERVICES = (
    "user",
    "agent",
    "channel",
    "memory",
    "billing",
    "plugin",
    "ws_gateway",
    "notification",
    "log_aggregator",
)

CHANNEL_TYPES = (
    "telegram",
    "slack",
    "feishu",
    "dingtalk",
    "wecom",
    "discord",
    "whatsapp",
    "line",
    "qq",
    "twilio",
    "teams",
    "webhook",
)

AGENT_EVENTS = Topic(
    "agent.events",
    partitions=8,
    retention=timedelta(days=7),
    key="session_key",
    messages=(
        agent.RunStarted,
        agent.RunForked,
        agent.MessagesTaken,
        agent.StepStarted,
        agent.StepRetried,
        agent.StepCompleted,
        agent.RunWaiting,
        agent.RunIndeterminate,
        agent.StepSettled,
        agent.RunCompleted,
        agent.RunMessageDeleted,
        agent.RunFailed,
    ),
    producers=("agent",),
    consumers=("ws_gateway", "memory", "log_aggregator", "notification"),
)
# Not ordered: a task is a hint, or it goes to a lane, which orders it.
AGENT_TASKS = Topic(
    "agent.tasks",
    partitions=4,
    retention=timedelta(days=1),
    key="session_key",
    messages=(agent.RunRequested, agent.LearningRequested),
    producers=("agent",),
    consumers=("agent",),
    ordered=False,
)
# Not ordered: the sum of debits does not depend on their order, and a bad record must not hold back a tenant's bill.
USAGE_RECORDS = Topic(
    "usage.records",
    partitions=4,
    retention=timedelta(days=30),
    key="tenant_id",
    messages=(billing.UsageRecorded,),
    producers=SERVICES,
    consumers=("billing", "log_aggregator"),
    ordered=False,
)
# Not ordered: a chain has the order of arrival, and a bad record must not hold back a tenant's chain.
AUDIT_LOGS = Topic(
    "audit.logs",
    partitions=2,
    retention=timedelta(days=90),
    key="tenant_id",
    messages=(audit.ActAudited,),
    producers=SERVICES,
    consumers=("log_aggregator",),
    ordered=False,
)
CHANNEL_EVENTS = Topic(
    "channel.events",
    partitions=4,
    retention=timedelta(days=7),
    key="session_key",
    messages=(
        channel.MessageReceived,
        channel.MessageDelivered,
        channel.MessageUndelivered,
        channel.AccountBroken,
    ),
    producers=("channel",),
    consumers=("agent", "billing", "log_aggregator", "notification"),
)
PLATFORM_EVENTS = Topic(
    "platform.events",
    partitions=2,
    retention=timedelta(days=30),
    key="tenant_id",
    messages=(
        user.TenantCreated,
        user.SubjectErased,
        user.TenantErased,
        user.TenantDataErased,
        billing.QuotaExhausted,
        billing.BudgetThresholdPassed,
        plugin.PluginChanged,
    ),
    producers=SERVICES,
    consumers=SERVICES,
)
SERVICE_LOGS = Topic(
    "service.logs",
    partitions=2,
    retention=timedelta(days=3),
    key="service",
    messages=(logs.LogLine,),
    producers=SERVICES,
    consumers=("log_aggregator",),
    ordered=False,
)

_SECONDS_TO_MINUTES = (timedelta(seconds=5), timedelta(seconds=30), timedelta(minutes=5))
_INBOUND = Exchange("channel.inbound", "topic")
_NOTIFICATION = Exchange("notification", "topic")
_NOTIFICATION_RETRIES = (timedelta(seconds=10), timedelta(seconds=60), timedelta(seconds=600))

# One queue per channel type, so that a flood of one vendor does not delay the others.
CHANNEL_INBOUND = {
    type_: Queue(
        f"channel.inbound.{type_}",
        exchange=_INBOUND,
        routing_key=type_,
        message=channel.MessageReceived,
        producers=("channel",),
        consumer="agent",
        retries=_SECONDS_TO_MINUTES,
    )
    for type_ in CHANNEL_TYPES
}
# A change of a message that has not been taken yet is retried; messages with files take up to two minutes.
CHANNEL_CHANGES = Queue(
    "channel.changes",
    exchange=Exchange("channel.changes", "direct"),
    routing_key="channel.changes",
    message=channel.MessageChanged,
    producers=("channel",),
    consumer="agent",
    retries=_SECONDS_TO_MINUTES,
)
CHANNEL_ANSWERS = Queue(
    "channel.answers",
    exchange=Exchange("channel.answers", "direct"),
    routing_key="channel.answers",
    message=channel.AnswerByPerson,
    producers=("channel",),
    consumer="agent",
    retries=_SECONDS_TO_MINUTES,
)
CHANNEL_OUTBOUND = Queue(
    "channel.outbound",
    exchange=Exchange("channel.outbound", "direct"),
    routing_key="channel.outbound",
    message=channel.SendMessage,
    producers=("agent",),
    consumer="channel",
    retries=_SECONDS_TO_MINUTES,
)
NOTIFICATION_EMAIL = Queue(
    "notification.email",
    exchange=_NOTIFICATION,
    routing_key="email",
    message=notification.SendEmail,
    producers=("user", "channel", "billing"),
    consumer="notification",
    retries=_NOTIFICATION_RETRIES,
    expires=timedelta(days=1),
)
NOTIFICATION_PUSH = Queue(
    "notification.push",
    exchange=_NOTIFICATION,
    routing_key="push",
    message=notification.SendPush,
    producers=("user", "channel", "billing"),
    consumer="notification",
    retries=_NOTIFICATION_RETRIES,
    expires=timedelta(days=1),
)
DOCUMENT_INDEX = Queue(
    "document.index",
    exchange=Exchange("document", "direct"),
    routing_key="index",
    message=memory.IndexDocument,
    producers=("memory",),
    consumer="memory",
    retries=_SECONDS_TO_MINUTES,
)
# A broadcast: each queue bound to the fanout exchange gets a copy. A further listening service binds a queue of its
# own. The instances of one service share a queue, and tell each other by the cache's pub/sub.
PLUGIN_EVENT = Queue(
    "plugin.event",
    exchange=Exchange("plugin", "fanout"),
    routing_key="",
    message=plugin.PluginChanged,
    producers=("plugin",),
    consumer="plugin",
    retries=_SECONDS_TO_MINUTES,
)

CATALOG = Catalog(
    topics=(
        AGENT_EVENTS,
        AGENT_TASKS,
        USAGE_RECORDS,
        AUDIT_LOGS,
        CHANNEL_EVENTS,
        PLATFORM_EVENTS,
        SERVICE_LOGS,
    ),
    queues=(
        *CHANNEL_INBOUND.values(),
        CHANNEL_CHANGES,
        CHANNEL_ANSWERS,
        CHANNEL_OUTBOUND,
        NOTIFICATION_EMAIL,
        NOTIFICATION_PUSH,
        DOCUMENT_INDEX,
        PLUGIN_EVENT,
    ),
)
