"""What the ledger calls."""

from __future__ import annotations

from infra.service import Runtime
from protos.sample.v1 import sample_pb2_grpc


def front(runtime: Runtime) -> sample_pb2_grpc.SampleAsyncStub:
    raise NotImplementedError
