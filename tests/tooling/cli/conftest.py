"""The sample services' database, for the tests of the operator's commands."""

from tests.infra.conftest import sample

__all__ = ["sample"]
