"""The kernel: technique only. No business noun appears here."""

import gc
import os

VERSION = "0.1.0"

# Before anything imports gRPC. Our processes fork only to run another program, and its handlers for a fork now and then
# crash that child before it does: a document's parser ended with a segmentation fault.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# Garbage cycles are looked for after 50,000 new objects instead of 700. Loading its libraries is a quarter of the time
# faster for a process so; and a batch of records is thousands of objects that live for a moment, of whose time the
# collector took a third.
gc.set_threshold(50_000, 20, 50)
