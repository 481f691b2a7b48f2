"""The embedding models in use. Searches work with the active one. If the settings name another one, that is the target:
it takes over once everything is embedded by it (`services.memory.indexes.model_change`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import NamedTuple

from infra.errors import EffectFailed, NotYet, Transient, describe
from infra.observe.logs import get_logger
from infra.postgres.database import Database
from infra.postgres.tx import Tx
from infra.security.crypto import Cipher
from infra.security.rewrap import SealedColumn
from services.memory.indexes.embeddings import LOCAL, Embedder, Endpoint

# A process learns of a change within this time.
CACHE_SECONDS = 1.0
# After an error of the target, nothing new is embedded by it for this time.
RETRY_SECONDS = 30.0
_PURPOSE = "embedding endpoint"
SEALED = SealedColumn("embedding_model", "sealed_api_key", _PURPOSE, ("key",), where="length(sealed_api_key) > 0")
_log = get_logger("memory.models")


class Current(NamedTuple):
    active: Embedder
    target: Embedder | None
    """The model that is to take over. It also embeds new texts."""
    is_target_well: bool
    """False if the target's endpoint has just given no answer."""


class EmbeddingModels:
    """`database`: the worker role's. `wanted`: the model of the settings. `make`: of a key and an endpoint."""

    def __init__(
        self, database: Database, cipher: Cipher, wanted: Endpoint, make: Callable[[str, Endpoint], Embedder]
    ) -> None:
        self._database = database
        self._cipher = cipher
        self._wanted = wanted
        self._make = make
        self._made: dict[tuple[str, Endpoint], Embedder] = {}
        self._known: tuple[float, Current] | None = None
        self._reading = asyncio.Lock()
        self._is_registered = False

    async def active(self) -> Embedder:
        """The model with which searches work now."""
        return (await self.current()).active

    async def current(self) -> Current:
        async with self._reading:
            if self._known is None or time.monotonic() - self._known[0] > CACHE_SECONDS:
                self._known = time.monotonic(), await self._read()
            return self._known[1]

    async def of(self, key: str) -> Embedder | None:
        """The model of these vectors, if it is still in use."""
        current = await self.current()
        return next((model for model in current[:2] if model and model.key == key), None)

    async def keep(self, tx: Tx, key: str) -> str | None:
        """Keeps the model in use until the commit. Returns the other model in use. Raises NotYet if it is given up."""
        keys = [
            found
            for (found,) in await tx.sql(
                "SELECT key FROM embedding_model WHERE state <> 'former' ORDER BY key FOR SHARE"
            )
        ]
        if key not in keys:
            raise self._changed()
        return next((other for other in keys if other != key), None)

    async def hold(self, tx: Tx, key: str) -> None:
        """Keeps the model active until the commit: the change to the next one will count the text of this transaction.
        Raises NotYet if another model is active: the text must be embedded by that one."""
        if not await tx.sql("SELECT FROM embedding_model WHERE key = $1 AND state = 'active' FOR SHARE", key):
            raise self._changed()

    async def by_target(self, work: Callable[[Embedder], Awaitable[None]]) -> None:
        """Does the work by the target too. No text waits for a model that is not in use yet: after an error it gets the
        text later."""
        current = await self.current()
        if current.target and current.is_target_well:
            try:
                await work(current.target)
            except NotYet:
                raise
            except (Transient, EffectFailed) as error:
                await self.note(current.target.key, error)
            else:
                await self.note(current.target.key, None)

    async def note(self, key: str, error: Exception | None) -> None:
        """Shows the error of a target. None: its endpoint answers; a refusal of a text stays until the switch."""
        if error is None:
            await self._database.autocommit(
                """
                UPDATE embedding_model
                SET error = NULL, failed_at = NULL
                WHERE key = $1 AND state = 'target' AND failed_at IS NOT NULL
                """,
                key,
            )
            return
        await self._database.autocommit(
            """
            UPDATE embedding_model
            SET error = $2, failed_at = CASE WHEN $3 THEN clock_timestamp() END
            WHERE key = $1 AND state = 'target'
            """,
            key,
            describe(error),
            isinstance(error, Transient),
        )
        self._known = None

    def _changed(self) -> NotYet:
        self._known = None
        return NotYet(timedelta(0), "the embedding model has changed")

    async def _read(self) -> Current:
        if not self._is_registered:
            async with self._database.begin() as tx:
                await self._register(tx)
            self._is_registered = True
        rows = await self._database.autocommit(
            """
            SELECT
                key, name, base_url, sealed_api_key,
                coalesce(failed_at < clock_timestamp() - make_interval(secs => $1), true)
            FROM embedding_model
            WHERE state <> 'former'
            ORDER BY state
            """,
            RETRY_SECONDS,
        )
        models = [self._embedder(*row[:4]) for row in rows]
        return Current(models[0], models[1] if models[1:] else None, rows[-1][-1])

    def _embedder(self, key: str, name: str, base_url: str | None, sealed: bytes) -> Embedder:
        api_key = self._cipher.open(sealed, _PURPOSE, key).decode() if sealed else None
        place = key, Endpoint(name, base_url, api_key)
        if place not in self._made:
            self._made[place] = self._make(*place)
        return self._made[place]

    async def _register(self, tx: Tx) -> None:
        """Records the model of the settings: it is active, or it is the target from now on."""
        await tx.take_turn("embedding models")
        rows = await tx.sql("SELECT key, name, base_url, state FROM embedding_model")
        keys = {key: state for key, *_, state in rows}
        same = [key for key, *place, state in rows if state != "former" and place == list(self._wanted[:2])]
        if not rows:
            # Of the time before this table. Vectors of a former endpoint cannot be searched: it is not known any more.
            [(has_local,)] = await tx.sql("SELECT EXISTS (SELECT FROM passage WHERE model = $1)", LOCAL.name)
            active = LOCAL if has_local else self._wanted
            await self._insert(tx, active.name, active, "active")
            same, keys = ([active.name] if active == self._wanted else []), {active.name: "active"}
        if not same or keys[same[0]] == "active":
            await tx.sql(
                "UPDATE embedding_model SET state = 'former', since = clock_timestamp() WHERE state = 'target'"
            )
        if same:
            await tx.sql(
                "UPDATE embedding_model SET sealed_api_key = $2, error = NULL, failed_at = NULL WHERE key = $1",
                same[0],
                self._sealed(same[0], self._wanted),
            )
        else:
            key = _unused(self._wanted.name, keys)
            await self._insert(tx, key, self._wanted, "target")
            _log.info("the embedding model changes once everything is embedded by the new one", target=key)

    async def _insert(self, tx: Tx, key: str, endpoint: Endpoint, state: str) -> None:
        await tx.sql(
            "INSERT INTO embedding_model (key, name, base_url, sealed_api_key, state) VALUES ($1, $2, $3, $4, $5)",
            key,
            endpoint.name,
            endpoint.base_url,
            self._sealed(key, endpoint),
            state,
        )

    def _sealed(self, key: str, endpoint: Endpoint) -> bytes:
        return self._cipher.seal(endpoint.api_key, _PURPOSE, key) if endpoint.api_key else b""


def _unused(name: str, keys: dict[str, str]) -> str:
    """The name, or with a number if vectors of another endpoint have it. Milvus does not distinguish all characters."""
    plain = {_letters(key) for key in keys}
    n, key = 1, name
    while _letters(key) in plain:
        n += 1
        key = f"{name}@{n}"
    return key


def _letters(key: str) -> str:
    return "".join(sign if sign.isascii() and sign.isalnum() else "_" for sign in key)


async def active_key(tx: Tx, *, lock: bool = False) -> str:
    """For operators: the name of the vectors in which searches look. lock: it stays so until the commit."""
    rows = await tx.sql(f"SELECT key FROM embedding_model WHERE state = 'active' {'FOR SHARE' if lock else ''}")
    return str(rows[0][0]) if rows else LOCAL.name


async def all_keys(tx: Tx) -> list[str]:
    """For operators: the names of the vectors of all models, also of those that are being deleted."""
    rows = await tx.sql("SELECT key FROM embedding_model ORDER BY key")
    return [key for (key,) in rows] or [LOCAL.name]


async def error_of(tx: Tx, key: str) -> str | None:
    """The last error of the target, if it has not worked since."""
    rows = await tx.sql("SELECT error FROM embedding_model WHERE key = $1", key)
    return rows[0][0] if rows else None
