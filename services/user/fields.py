"""Field types of the HTTP surface."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from pydantic import BaseModel, ConfigDict, StringConstraints

from infra.errors import InvalidMessage
from infra.service.api import Paging

# No control characters: PostgreSQL takes no NUL, and a line break in a name forges lines of a mail or a log.
Name = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")
]
# Whether it exists is known when a mail arrives; this keeps out what could be more than one address, or a header.
Email = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True, max_length=254, pattern=r"^[^\s\x00-\x1f\x7f@<>,;:]+@[^\s\x00-\x1f\x7f@<>,;:]+$"
    ),
]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


def after(paging: Paging) -> UUID | None:
    """The id that a page begins behind. Raises InvalidMessage for a cursor that is none."""
    try:
        return UUID(paging.after) if paging.after else None
    except ValueError:
        raise InvalidMessage("cursor", "is none that a list gave") from None
