"""An agent as HTTP shows it and takes it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr

from services.agent.models import scripted
from services.agent.models.contract import FAMILIES
from services.agent.sessions.domain import QueueMode

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
        raise ValueError("a tool is named twice")
    return names


Name = Annotated[str, Field(min_length=1, max_length=200)]
ModelName = Annotated[str, Field(max_length=200), AfterValidator(_model)]


# As models' providers take it.
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
ToolNames = Annotated[tuple[str, ...], Field(max_length=50), AfterValidator(_distinct)]


Concurrency = Annotated[int | None, Field(ge=1, le=10_000)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Budget(_Body):
    """What an agent may spend per period (UTC), in 10⁻⁹ of the tenant's currency."""

    nanos: int = Field(ge=0, le=MAX_NANOS)
    period: Literal["day", "month"]


class RunLimits(_Body):
    """What one run may take at most. tokens: input and output of all its model calls; null: as many as it needs.

    seconds: without the time in which it waits for a person. nanos: what its model calls may cost, 10⁻⁹ of the
    tenant's currency.
    """

    steps: int = Field(default=20, ge=1, le=100)
    seconds: int = Field(default=300, ge=1, le=3600)
    tokens: int | None = Field(default=None, ge=1)
    nanos: int | None = Field(default=None, ge=1, le=MAX_NANOS)


class Provider(_Body):
    """Where the model is asked. base_url: as the provider writes it, mostly ending in ``/v1``."""

    base_url: Annotated[str, AfterValidator(_base_url)] | None = None
    api_key: SecretStr | None = Field(default=None, min_length=1, max_length=1000)


class Fallback(_Body):
    """A model that is asked where the agent's own gives no answer. provider: null is the agent's own."""

    model: ModelName
    provider: Provider | None = None


class Colleague(_Body):
    """Another agent of the tenant that this one may ask. name: what its model calls it by; description: for what."""

    agent_id: UUID
    name: ToolName
    description: str = Field(min_length=1, max_length=2000)


class NewAgent(_Body):
    """The body of ``POST /api/v1/agents``, and what is stored of an agent, without the providers' keys.

    approval: those of the tools that a person has to allow, call by call. output_schema: JSON Schema of an object that
    every reply has to be, as JSON text, unless who asks gives another. agents: which others it may ask, as if they were
    tools.
    concurrency: how many of its runs may go on at once; model_concurrency: how many of all runs of the tenant that have
    its model at its provider; null: all.
    """

    name: Name
    model: ModelName
    provider: Provider | None = None
    system_prompt: str = Field(default="", max_length=100_000)
    tools: ToolNames = ()
    approval: ToolNames = ()
    fallback: Fallback | None = None
    output_schema: dict[str, Any] | None = None
    agents: Annotated[tuple[Colleague, ...], Field(max_length=20)] = ()
    knowledge: bool = False
    queue_mode: QueueMode = "collect"
    budget: Budget | None = None
    limits: RunLimits = RunLimits()
    concurrency: Concurrency = None
    model_concurrency: Concurrency = None
    enabled: bool = True

    @property
    def tool_names(self) -> frozenset[str]:
        """What its model calls tools by, other agents among them."""
        return frozenset((*self.tools, *(other.name for other in self.agents)))


class AgentChange(NewAgent):
    """The body of ``PATCH /api/v1/agents/{id}``: what is given is changed, all else stays.

    A provider given without its api_key keeps the key that is stored, unless the base_url changes; so does that of the
    fallback.
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


class AgentView(BaseModel):
    """An agent as it is now. `version` counts its changes from 1."""

    id: UUID
    version: int
    name: str
    model: str
    provider: ProviderView | None
    system_prompt: str
    tools: tuple[str, ...]
    approval: tuple[str, ...]
    fallback: FallbackView | None
    output_schema: dict[str, Any] | None
    agents: tuple[Colleague, ...]
    knowledge: bool
    queue_mode: QueueMode
    budget: Budget | None
    limits: RunLimits
    concurrency: int | None
    model_concurrency: int | None
    enabled: bool
    created_at: datetime
    updated_at: datetime
