"""What the kernel and a service may raise; everything else is a fault: retried, then a dead letter.

A handler never catches these to hide them: the bus, HTTP and gRPC each turn them into their own answer.
"""

from __future__ import annotations

from datetime import timedelta


class InvalidMessage(Exception):
    """The input can never be processed: a message is dead-lettered at once, a request answered 422.

    `field` is the path of what is wrong (``amount_nanos``, ``header ce_id``, ``body``).
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class WrongType(InvalidMessage):
    """What was sent is of a type that is not taken here. HTTP 415; elsewhere as `InvalidMessage`."""


class Unauthenticated(Exception):
    """Who calls is not known: no credentials, or none that verify. HTTP 401, gRPC UNAUTHENTICATED."""


class Forbidden(Exception):
    """The caller is known and may not do this. HTTP 403, gRPC PERMISSION_DENIED."""


class NotFound(Exception):
    """There is no such thing, or it belongs to another tenant. HTTP 404, gRPC NOT_FOUND."""


class Conflict(Exception):
    """Somebody else was first: the kernel loads again and decides again, a bounded number of times.

    Reaching a caller it is HTTP 409, gRPC ABORTED.
    """


class TooLarge(Exception):
    """What was sent is larger than the limit the message names. HTTP 413, gRPC RESOURCE_EXHAUSTED."""


class Transient(Exception):
    """It passes by itself: retried with backoff. HTTP 503, gRPC UNAVAILABLE."""


class RetryLater(Transient):
    """As `Transient`, and tried again no sooner than `after`. HTTP 503 with Retry-After, gRPC UNAVAILABLE."""

    def __init__(self, after: timedelta, reason: str = "asked to try again later") -> None:
        super().__init__(reason)
        self.after = after


class NotYet(RetryLater):
    """Nothing has failed: its turn has not come. It is tried again, and nobody need be told."""


class TooManyRequests(RetryLater):
    """The caller is over its rate limit. HTTP 429 with Retry-After; elsewhere as `RetryLater`."""


class Unanswered(Exception):
    """It was sent and no answer came: nobody knows whether it happened. Tried again only where that is harmless.

    Not a `Transient`, which says that nothing has happened.
    """


class EffectFailed(Exception):
    """The other side refused for good; trying again changes nothing. `reason` is stored and shown to operators."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def describe(error: BaseException) -> str:
    """`error` for a log line or a dead letter: its type and its text."""
    return f"{type(error).__name__}: {error}"
