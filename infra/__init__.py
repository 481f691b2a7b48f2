"""The kernel: technique only. No business noun appears here (infra.cli and infra.testing excepted)."""

VERSION = "0.1.0"
