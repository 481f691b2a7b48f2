"""Public facts and commands, one module per owning service.

A message gets a new version if a change of its shape could break a reader. The old struct then moves to
``protos/messages/v<old>/<owner>.py`` and stays there with its schema and example, because its records are retained.
"""

from datetime import datetime
from typing import Annotated

import msgspec

Timestamp = Annotated[datetime, msgspec.Meta(tz=True)]
"""RFC 3339 with an offset; without one, readers in two time zones would read two different times."""
Count = Annotated[int, msgspec.Meta(ge=0)]
"""Never below zero; a negative quantity would give money back."""
