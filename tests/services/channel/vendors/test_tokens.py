"""Access tokens of vendors in the memory of a process, by credentials that tenants choose."""

from __future__ import annotations

import pytest

from services.channel.vendors import base


async def test_the_tokens_of_the_last_accounts_are_kept_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "KEPT_TOKENS", 3)
    tokens = base.Tokens()
    fetched: list[int] = []

    async def token(account: int) -> str:
        async def fetch() -> tuple[str, float]:
            fetched.append(account)
            return str(account), 3_600.0

        return await tokens.get(account, fetch)

    assert [await token(n) for n in (*range(10), 9, 8, 7)] == [*"0123456789987"]
    assert fetched == [*range(10)]
    assert (len(tokens._tokens), len(tokens._locks)) == (3, 3)
    assert await token(0) == "0"
    assert fetched[-1] == 0
