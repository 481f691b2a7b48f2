"""A dict of bounded size."""

from __future__ import annotations

from infra.recent import Recent


def test_the_keys_that_were_set_the_longest_ago_are_forgotten() -> None:
    recent: Recent[str, int] = Recent(2)
    recent["a"] = recent["b"] = 1
    recent["a"] = 2
    assert recent.setdefault("c", 3) == 3
    assert dict(recent) == {"a": 2, "c": 3}
