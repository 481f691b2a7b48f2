"""The kernel: technique only. No business noun appears here (infra.cli and infra.testing excepted)."""
