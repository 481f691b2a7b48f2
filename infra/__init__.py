"""The kernel: technique only. No business noun appears here."""

import gc
import os

VERSION = "0.1.0"

# Before anything imports gRPC. Our processes fork only to run another program, and its handlers for a fork now and then
# crash that child before it does: a document's parser ended with a segmentation fault.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# The collector searches for garbage cycles after 50,000 new objects instead of 700. A process then loads its libraries
# in three quarters of the time. A batch of records makes thousands of short-lived objects, and the collector took a
# third of the batch's time.
gc.set_threshold(50_000, 20, 50)
