"""The kernel: technique only. No business noun appears here (infra.cli and infra.testing excepted)."""

import os

VERSION = "0.1.0"

# Before anything imports gRPC. Our processes fork only to run another program, and its handlers for a fork now and then
# crash that child before it does: a document's parser ended with a segmentation fault.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
