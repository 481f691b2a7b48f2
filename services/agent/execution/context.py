"""The run under execution, and the services that it calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import grpc.aio
import msgspec

from infra.postgres.database import Database
from infra.postgres.tx import Tx, derived_id
from infra.security.crypto import DataKey
from infra.security.subjects import SubjectKeys
from infra.stores.cache import Cache
from infra.stores.objects import Objects
from infra.web import rpc
from protos.billing.v1 import billing_pb2_grpc
from protos.catalog import AGENT_EVENTS, AGENT_TASKS
from protos.memory.v1 import memory_pb2_grpc
from protos.messages import agent as public
from protos.plugin.v1 import plugin_pb2_grpc
from services.agent.execution import conversation
from services.agent.execution.outcome import Reply
from services.agent.models.contract import UserTurn
from services.agent.runs import family
from services.agent.runs.content import SAID_CHARACTERS, StoredFile
from services.agent.runs.domain import Complete, Run
from services.agent.runs.family import ChildState, child_id
from services.agent.runs.limits import Limits
from services.agent.runs.metering import UsageOrigin
from services.agent.runs.progress import ProgressReporter
from services.agent.runs.publishing import published


@dataclass(frozen=True)
class Services:
    """The other services that a run calls, and the cache that carries live text."""

    memory: memory_pb2_grpc.MemoryStub
    billing: billing_pb2_grpc.BillingStub
    plugin: plugin_pb2_grpc.PluginStub
    cache: Cache
    objects: Objects | None = None
    """The store of images; None: there is none."""


@dataclass
class RunContext:
    """One run in one worker, and the reads from the database that it needs meanwhile."""

    database: Database
    subjects: SubjectKeys
    run_id: UUID
    tenant_id: str
    session_key: str
    agent_id: UUID
    subject_id: str
    key: DataKey
    """The subject's. All content of the run is sealed with it."""
    limits: Limits
    depth: int
    """How many runs asked for each other before this one."""
    state: Run
    """Folded from the journal when the worker began, then kept up to date."""
    messages: int
    """How many messages the run has, as of the last load or commit."""
    said: str = ""
    """The message of the subject, if the run has no other's."""
    message_id: str | None = None
    """The last message of the subject, under the same condition."""
    learns: bool = False
    """Whether the agent's model shall find facts about the subject in `said`."""
    last_step: int = 0
    """Number of the last step that was made or taken from the journal in this execution."""
    channel_id: UUID | None = None
    """None: the run came by the API."""
    approvers: tuple[str, ...] = ()
    """The channel's; empty: the agent's."""
    progress: ProgressReporter | None = None
    """None: no channel shows it."""
    tag: str = ""
    """The agent's, for reports of usage."""

    @property
    def metadata(self) -> grpc.aio.Metadata:
        return rpc.tenant_metadata(self.tenant_id)

    @property
    def origin(self) -> UsageOrigin:
        """The source of the run's usage."""
        return UsageOrigin(
            self.run_id,
            self.tenant_id,
            self.agent_id,
            self.channel_id,
            self.session_key,
            self.subject_id,
            self.tag,
        )

    def completion(self, reply: Reply) -> Complete:
        """The command that ends the run with the reply, whose texts are sealed."""
        sealing = self.tenant_id, self.subject_id, str(self.run_id)
        sealed = self.key.seal(reply.text, *sealing, "reply")
        calls = self.key.seal(msgspec.json.encode(reply.calls).decode(), *sealing, "calls") if reply.calls else None
        return Complete(self.session_key, sealed, calls, reply.finish_reason, reply.filtered)

    def completed(self, n: int, reply: Reply) -> public.RunCompleted:
        """The public message of the event `n`, which ended the run. The event itself is sealed."""
        return public.RunCompleted(
            run_id=self.run_id,
            session_key=self.session_key,
            reply=reply.text,
            n=n,
            tool_calls=published(reply.calls),
            finish_reason=reply.finish_reason,
            filtered=reply.filtered,
            subject_id=self.subject_id,
            said=self.said[:SAID_CHARACTERS],
            channel_id=self.channel_id,
            message_id=self.message_id,
            learning="model" if self.learns else "rules",
        )

    def publish_end(self, tx: Tx, n: int, reply: Reply) -> None:
        """Publishes in `tx` that the event `n` ended the run, and that there is something to learn from it."""
        message_id = derived_id(self.run_id, "RunCompleted")
        tx.publish(AGENT_EVENTS, self.completed(n, reply), key=self.session_key, message_id=message_id)
        if self.learns:
            asked = public.LearningRequested(
                run_id=self.run_id, session_key=self.session_key, subject_id=self.subject_id
            )
            message_id = derived_id(self.run_id, "LearningRequested")
            tx.publish(AGENT_TASKS, asked, key=self.session_key, message_id=message_id)

    # Nothing is written by these reads, so they need no fence.

    async def later_messages(self, skip: int) -> Sequence[UserTurn]:
        """The run's messages that exist now, without the first `skip`."""
        async with self.database.read_only(tenant_id=self.tenant_id) as tx:
            return await conversation.later_messages(tx, self.subjects, self.run_id, skip)

    async def speaker(self) -> str:
        """The person who alone wrote all messages that the run has now. Empty if there are several people, or if
        another agent asked."""
        if self.depth:
            return ""
        async with self.database.read_only(tenant_id=self.tenant_id) as tx:
            rows = await tx.sql(
                "SELECT DISTINCT subject_id FROM message WHERE run_id = $1 AND NOT decides LIMIT 2", self.run_id
            )
        speakers = [subject_id for (subject_id,) in rows]
        return self.subject_id if speakers == [self.subject_id] else ""

    async def child(self, step: int) -> ChildState | None:
        """The run that answers the step; None if there is none yet."""
        async with self.database.read_only(tenant_id=self.tenant_id) as tx:
            return await family.child_state(tx, self.subjects, child_id(self.run_id, step))

    async def files_of_child(self, step: int) -> tuple[StoredFile, ...]:
        """The files that the run which answers the step has for the person."""
        async with self.database.read_only(tenant_id=self.tenant_id) as tx:
            return await family.files_of(tx, self.subjects, child_id(self.run_id, step))

    async def is_in_chat(self) -> bool:
        """True if a channel shows the answer of this run, or of the run that asked first."""
        if self.channel_id or not self.depth:
            return self.channel_id is not None
        async with self.database.read_only(tenant_id=self.tenant_id) as tx:
            return await family.is_in_chat(tx, self.run_id)

    async def family(self) -> Sequence[UUID]:
        """This run and all runs that it has asked for, directly or not."""
        async with self.database.read_only(tenant_id=self.tenant_id) as tx:
            return await family.family(tx, self.run_id)
