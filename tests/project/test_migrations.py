"""The migrations of each service are one chain, and each file is named after its revision."""

from __future__ import annotations

import re

from tooling.stack.checkout import CHECKOUT


def test_each_service_has_one_chain_of_migrations() -> None:
    folders = sorted((CHECKOUT / "services").glob("*/migrations"))
    assert len(folders) >= 8
    for folder in folders:
        previous = "None"
        for path in sorted(folder.glob("0*.py")):
            found = re.findall(r'^(revision|down_revision) = "?(\w+)"?$', path.read_text(), re.MULTILINE)
            # Two branches that take the same number merge without a conflict, and then no service starts.
            assert found == [("revision", path.name[:4]), ("down_revision", previous)], path
            previous = path.name[:4]
