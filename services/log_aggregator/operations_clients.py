"""Asks the services for the operations that each process serves by gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from infra.errors import Transient
from infra.security.auth import Identity
from infra.service.service import Runtime
from infra.web import rpc
from protos.ops.v1 import ops_pb2_grpc
from services.log_aggregator.settings import operations

Method = Callable[[ops_pb2_grpc.OperationsStub], Callable[..., Awaitable[Any]]]
_SAFE = [
    f"clawbus.ops.v1.Operations/{name}"
    for name in ("ListDeadLetters", "GroupDeadLetters", "GetDeadLetter", "CheckHealth")
]


class OperationsClients:
    """The clients of all services, by their names in order."""

    def __init__(self, runtime: Runtime) -> None:
        self.stubs: Mapping[str, ops_pb2_grpc.OperationsStub] = {
            name: ops_pb2_grpc.OperationsStub(runtime.channels.to(target, name, safe=_SAFE))
            for name, target in sorted(operations(runtime.settings.operations).items())
        }

    async def ask(
        self, who: Identity | None, requests: Mapping[str, Any], method: Method
    ) -> tuple[list[tuple[str, Any]], list[str]]:
        """The services' replies by the order of `requests`, and the names of those that do not answer."""
        replies = await asyncio.gather(
            *(method(self.stubs[name])(request, metadata=metadata(who)) for name, request in requests.items()),
            return_exceptions=True,
        )
        answered: list[tuple[str, Any]] = []
        unavailable: list[str] = []
        for name, reply in zip(requests, replies, strict=True):
            if isinstance(reply, Transient):
                unavailable.append(name)
            elif isinstance(reply, BaseException):
                raise reply
            else:
                answered.append((name, reply))
        return answered, unavailable


def metadata(who: Identity | None) -> Any:
    """The metadata of a call for this client. Without a tenant the call is for the operator."""
    return rpc.tenant_metadata(who.tenant_id) if who and who.tenant_id else None
