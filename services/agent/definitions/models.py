"""The bodies of the HTTP API of agents."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr

from services.agent.definitions.approvers import DEFAULT, PATTERN
from services.agent.definitions.queue_modes import QueueMode
from services.agent.models import scripted
from services.agent.models.contract import FAMILIES

MAX_NANOS = 10**18


def _model(name: str) -> str:
    family, slash, own_name = name.partition("/")
    if family not in FAMILIES or not slash or not own_name.strip():
        raise ValueError(f"must be <family>/<model>, the family one of {', '.join(FAMILIES)}")
    if family == "scripted" and name != scripted.NAME:
        raise ValueError(f"the only scripted model is {scripted.NAME}")
    return name


def _base_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("must be an http or https URL")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("must have no user, query or fragment")
    return url.rstrip("/")


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("must not name a tool twice")
    return names


Name = Annotated[str, Field(min_length=1, max_length=200)]
ModelName = Annotated[str, Field(max_length=200), AfterValidator(_model)]


# The names that model providers accept.
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Approver = Annotated[str, Field(pattern=PATTERN)]
ToolNames = Annotated[tuple[str, ...], Field(max_length=50), AfterValidator(_distinct)]


Concurrency = Annotated[int | None, Field(ge=1, le=10_000)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AgentBudget(_Body):
    """The budget of an agent per period (UTC)."""

    nanos: int = Field(ge=0, le=MAX_NANOS)
    """In 10⁻⁹ of the tenant's currency."""
    period: Literal["day", "month"]


class RunLimits(_Body):
    """The limits of one run."""

    steps: int = Field(default=20, ge=1, le=100)
    seconds: int = Field(default=300, ge=1, le=3600)
    """Without the time in which the run waits for a person."""
    tokens: int | None = Field(default=None, ge=1)
    """Input and output of all its model calls; null: no limit."""
    nanos: int | None = Field(default=None, ge=1, le=MAX_NANOS)
    """The cost of its model calls, in 10⁻⁹ of the tenant's currency; null: no limit."""


class Provider(_Body):
    """The server of a model."""

    base_url: Annotated[str, AfterValidator(_base_url)] | None = None
    """As the provider documents it, usually ending in ``/v1``."""
    api_key: SecretStr | None = Field(default=None, min_length=1, max_length=1000)


class Fallback(_Body):
    """A model that is called if the agent's own model gives no answer."""

    model: ModelName
    provider: Provider | None = None
    """Null: the agent's own provider."""


class Colleague(_Body):
    """Another agent of the tenant that this agent may call like a tool."""

    agent_id: UUID
    name: ToolName
    """The name under which the model calls it."""
    description: str = Field(min_length=1, max_length=2000)
    """Tells the model when to call it."""


class NewAgent(_Body):
    """The body of ``POST /api/v1/agents``, and the stored form of an agent without the providers' keys."""

    name: Name
    model: ModelName
    provider: Provider | None = None
    system_prompt: str = Field(default="", max_length=100_000)
    tools: ToolNames = ()
    approval: ToolNames = ()
    """The tools whose calls need the approval of a person."""
    approvers: Annotated[tuple[Approver, ...], Field(min_length=1, max_length=100)] = DEFAULT
    """Who may give it: asker (the person who asked), chat-admins (whom the vendor calls an administrator of the group),
    person:<subject id>, member:<id>, group:<name>, api_key:<id>, or at the API each client with scope:<scope>."""
    fallback: Fallback | None = None
    output_schema: dict[str, Any] | None = None
    """JSON Schema of an object that every reply must match, as JSON text, unless the caller gives another schema."""
    agents: Annotated[tuple[Colleague, ...], Field(max_length=20)] = ()
    """The other agents that it may call like tools."""
    knowledge: bool = False
    learning: Literal["rules", "model"] = "rules"
    """How facts about the person who speaks are found, for later runs. model: after each run the agent's model is asked
    once more, which is billed; rules find them if it fails."""
    queue_mode: QueueMode = "collect"
    tag: str = Field(default="", pattern=r"^[\w .:/-]{0,100}$")
    """Groups its usage in reports, such as a cost centre."""
    budget: AgentBudget | None = None
    limits: RunLimits = RunLimits()
    concurrency: Concurrency = None
    """How many runs of this agent may be active at once; null: no limit."""
    model_concurrency: Concurrency = None
    """How many runs of the tenant with the same model and provider may be active at once; null: no limit."""
    enabled: bool = True

    @property
    def tool_names(self) -> frozenset[str]:
        """The names under which the model calls tools and other agents."""
        return frozenset((*self.tools, *(other.name for other in self.agents)))


class AgentChange(NewAgent):
    """The body of ``PATCH /api/v1/agents/{id}``. Absent fields stay as they are.

    A provider without an api_key keeps the stored key, unless the base_url changes. The same holds for the fallback.
    """

    name: Name = ""
    model: ModelName = ""


class ProviderView(BaseModel):
    """A provider without its key."""

    base_url: str | None


class FallbackView(BaseModel):
    """A fallback without its key."""

    model: str
    provider: ProviderView | None


class ShortAgentView(BaseModel):
    """An agent without its definition."""

    id: UUID
    name: str
    enabled: bool
    created_at: datetime


class AgentView(BaseModel):
    """The current version of an agent."""

    id: UUID
    version: int
    """Counts from 1."""
    name: str
    model: str
    provider: ProviderView | None
    system_prompt: str
    tools: tuple[str, ...]
    approval: tuple[str, ...]
    approvers: tuple[str, ...]
    fallback: FallbackView | None
    output_schema: dict[str, Any] | None
    agents: tuple[Colleague, ...]
    knowledge: bool
    learning: Literal["rules", "model"]
    queue_mode: QueueMode
    tag: str
    budget: AgentBudget | None
    limits: RunLimits
    concurrency: int | None
    model_concurrency: int | None
    enabled: bool
    created_at: datetime
    updated_at: datetime
    warnings: list[str] = []
    """Faults that do not keep the agent from working, such as a model without a price. Only after a change."""
