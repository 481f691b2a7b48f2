"""The gRPC client of the front."""

from __future__ import annotations

from infra.service.service import Runtime
from protos.sample.v1 import sample_pb2_grpc


def front(runtime: Runtime) -> sample_pb2_grpc.SampleStub:
    safe = ["clawbus.sample.v1.Sample/Seen"]
    return sample_pb2_grpc.SampleStub(runtime.channels.to(runtime.settings.front_grpc, "sample_front", safe=safe))
