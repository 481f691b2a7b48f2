"""The field types of the HTTP routes."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

from infra.web.json_text import NAME_PATTERN

Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200, pattern=NAME_PATTERN)]
# Only a delivered mail proves that an address exists. The pattern refuses lists of addresses and header lines.
Email = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True, max_length=254, pattern=r"^[^\s\x00-\x1f\x7f@<>,;:]+@[^\s\x00-\x1f\x7f@<>,;:]+$"
    ),
]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class View(BaseModel):
    """The comments under the fields stand on the page of the API."""

    model_config = ConfigDict(use_attribute_docstrings=True)
