"""Public facts and commands, one module per owning service.

A message's version rises when its shape changes so that a reader could break. Its old struct then moves to
``protos/messages/v<old>/<owner>.py`` and stays, as do its schema and example: records of it are retained.
"""

from datetime import datetime
from typing import Annotated

import msgspec

# RFC 3339 with its offset: a time without one would be read differently in another zone.
Timestamp = Annotated[datetime, msgspec.Meta(tz=True)]
# Below zero it would give money back.
Count = Annotated[int, msgspec.Meta(ge=0)]
