"""The errors that kernel and services raise on purpose. Every other error is a fault: retried, then a dead letter.

A handler never catches these errors to hide them: the bus, HTTP and gRPC each turn them into their own answer.
"""

from __future__ import annotations

from datetime import timedelta


class InvalidMessage(Exception):
    """The input can never be processed: a message is dead-lettered at once, a request answered 422.

    `field` is the path of the wrong value (``amount_nanos``, ``header ce_id``, ``body``).
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class WrongType(InvalidMessage):
    """The content has a type that is not accepted. HTTP 415; elsewhere as `InvalidMessage`."""


class Unauthenticated(Exception):
    """The caller is not known: the credentials are missing or not valid. HTTP 401, gRPC UNAUTHENTICATED."""


class Forbidden(Exception):
    """The caller is known and may not do this. HTTP 403, gRPC PERMISSION_DENIED."""


class NotFound(Exception):
    """The thing does not exist, or it belongs to another tenant. HTTP 404, gRPC NOT_FOUND."""


class Conflict(Exception):
    """Another transaction was first. The kernel loads and decides again, a bounded number of times.

    If the error reaches a caller: HTTP 409, gRPC ABORTED.
    """


class TooLarge(Exception):
    """The content is larger than the limit that the message names. HTTP 413, gRPC RESOURCE_EXHAUSTED."""


class Transient(Exception):
    """The cause passes by itself: retried with backoff. HTTP 503, gRPC UNAVAILABLE."""


class RetryLater(Transient):
    """As `Transient`, and not retried before `after`. HTTP 503 with Retry-After, gRPC UNAVAILABLE."""

    def __init__(self, after: timedelta, reason: str = "asked to try again later") -> None:
        super().__init__(reason)
        self.after = after


class NotYet(RetryLater):
    """Nothing has failed: the message must wait for its turn. It is retried without a warning."""


class TooManyRequests(RetryLater):
    """The caller is over its rate limit. HTTP 429 with Retry-After; elsewhere as `RetryLater`."""


class Unanswered(Exception):
    """A request was sent and no answer came: it may or may not have had its effect. Retried only if that is harmless.

    Not a `Transient`, which says that nothing has happened.
    """


class InDoubt(Transient):
    """As `Transient`, but the request may have had its effect. For requests that are repeated under the same key."""


class EffectFailed(Exception):
    """The other side refused permanently: a retry changes nothing. `reason` is stored and shown to operators."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class NoCredit(EffectFailed):
    """The tenant's credit or a budget does not suffice. HTTP 402, gRPC FAILED_PRECONDITION."""


def describe(error: BaseException) -> str:
    """`error` for a log line or a dead letter: its type and its text."""
    return f"{type(error).__name__}: {error}"
