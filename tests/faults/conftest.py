"""The sample's three processes on the suite's engines, to be killed and paused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from infra.testing.otlp import Receiver
from infra.testing.sample.run import Engines, SampleServices
from infra.testing.stack import Stack
