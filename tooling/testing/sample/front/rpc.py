"""gRPC of the front: the ledger reports the notes that it has counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc.aio

from infra.service.service import Runtime
from protos.sample.v1 import sample_pb2, sample_pb2_grpc


class Sample(sample_pb2_grpc.SampleServicer):
    async def Seen(
        self, request: sample_pb2.SeenRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> sample_pb2.SeenReply:
        return sample_pb2.SeenReply(count=request.count, note=f"the front knows of notebook {request.key}")


def servicer(runtime: Runtime) -> tuple[Callable[[Any, Any], None], Any]:
    return sample_pb2_grpc.add_SampleServicer_to_server, Sample()
