"""Calls between services: gRPC with deadlines, retries where they are safe, trace, and the caller's identity.

A call carries its deadline, the trace context and a token that says which service calls; a server refuses a call that
lacks the first or the last. Errors of `infra.errors` cross the wire: what a servicer raises, the caller's code gets.
"""

from __future__ import annotations

import time
from contextvars import ContextVar

import grpc
import grpc.aio

from infra.errors import (
    Conflict,
    Forbidden,
    InvalidMessage,
    NotFound,
    RetryLater,
    TooLarge,
    Transient,
    Unauthenticated,
)

Code = grpc.StatusCode

TOKEN_KEY = "authorization"
# The field of an InvalidMessage, in the trailing metadata: details are for people.
FIELD_KEY = "claw-field"
HEALTH_PREFIX = "/grpc.health.v1.Health/"

# Both sides ask for a sign of life on quiet connections: a peer that vanished is noticed in under a minute.
KEEPALIVE: list[tuple[str, int]] = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]

_CODES: dict[type[Exception], grpc.StatusCode] = {
    InvalidMessage: Code.INVALID_ARGUMENT,
    Unauthenticated: Code.UNAUTHENTICATED,
    Forbidden: Code.PERMISSION_DENIED,
    NotFound: Code.NOT_FOUND,
    Conflict: Code.ABORTED,
    TooLarge: Code.RESOURCE_EXHAUSTED,
    RetryLater: Code.UNAVAILABLE,
    Transient: Code.UNAVAILABLE,
}
