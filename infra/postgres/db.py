"""PostgreSQL: a pool of connections per role, statements, and the database's transient errors."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from time import perf_counter
from typing import Any

import asyncpg
from sqlalchemy import Engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from infra.connections import postgres_context
from infra.errors import Transient
from infra.observe.metrics import STATEMENTS
from infra.outgoing.shares import Shares, tenant

# The server ends a session that is idle in a transaction for longer. A consumer that is stopped in the middle of a
# transaction holds its offset row. Without this limit the next owner of the partition would wait for that row for as
# long as the process stays stopped.
IDLE_IN_TRANSACTION_MS = 5_000
# This limit also covers a statement that is prepared and not executed yet, which counts neither as idle nor as running:
# a process that is stopped there would keep its row locks.
TRANSACTION_TIMEOUT_MS = 45_000
# No statement of the kernel runs for long. One that does would hold locks that others wait for.
STATEMENT_TIMEOUT_MS = 30_000
# A server that has vanished without a word (its host is lost, a firewall has forgotten the connection) is noticed after
# about so many seconds. Its own limits for statements do not help: the answer about them does not come either.
SILENCE_SECONDS = 30
# So long a transaction waits for a free connection of the pool.
POOL_TIMEOUT_SECONDS = 10.0
# Connections beside those for transactions, for work that holds one for minutes: a replay, a verification.
BESIDE_TRANSACTIONS = 3

CONFLICT = "P0C01"
"""The state that our SQL functions raise if a stream is not at the version that the caller expects."""

_TRANSIENT_STATES = (
    "08",  # connection
    "40001",  # serialisation failure
    "40P01",  # deadlock
    "53",  # out of resources: disk, memory, connections
    "55P03",  # lock not available
    "57",  # cancelled, shut down, cannot connect now
    "25P03",  # idle in transaction for too long
    "25P04",  # in a transaction for too long
    "25006",  # read only: a fail-over is under way
)


class Pool(AsyncEngine):
    """The connections of one role, `size` of them for transactions. Each tenant has a share of these, see `Shares`.

    `take` and `give_back` keep them out of SQLAlchemy's own pool between two transactions. Its work to hand out a
    connection and to take it back costs eight times as much CPU time as a statement.
    """

    def __init__(self, engine: Engine, size: int) -> None:
        super().__init__(engine)
        self._size = size
        self._places = Shares(size)
        # Each piece of the platform's own work asks for itself, so it gets any connection that is free.
        self._of_platform = count()
        self._askers: dict[AsyncConnection, str] = {}
        self._idle: list[AsyncConnection] = []
        self.taken = 0

    @property
    def used_ratio(self) -> float:
        """The part of the connections for transactions that is in use, 0 to 1."""
        return self.taken / self._size

    async def take(self) -> AsyncConnection:
        """A connection on which each statement is a transaction of its own, unless `begin` begins a longer one.

        `give_back` must be called with it. Raises TimeoutError of SQLAlchemy if none gets free in time.
        """
        asker = tenant.get() or f"platform {next(self._of_platform)}"
        if not self._places.take_now(asker):
            began = perf_counter()
            try:
                await asyncio.wait_for(self._places.take(asker), POOL_TIMEOUT_SECONDS)
            except TimeoutError:
                raise PoolTimeoutError(f"no connection of {self._size} got free in time") from None
            finally:
                STATEMENTS.waited(perf_counter() - began)
        self.taken += 1
        try:
            connection = await self._usable()
        except BaseException:
            self._end_use(asker)
            raise
        self._askers[connection] = asker
        return connection

    async def _usable(self) -> AsyncConnection:
        """An idle connection, or a new one. Gives up those that the server has closed (a restart)."""
        while self._idle:
            connection = self._idle.pop()
            driver = _driver(connection)
            if driver is not None and not driver.is_closed():
                return connection
            await connection.close()
        return await self.execution_options(isolation_level="AUTOCOMMIT").connect()

    async def give_back(self, connection: AsyncConnection) -> None:
        """Rolls back the transaction that `begin` began, if it was not committed."""
        try:
            driver = _driver(connection)
            if driver is not None and driver.is_in_transaction():
                await _command(connection, "ROLLBACK")
        except (DBAPIError, OSError, TimeoutError, asyncpg.InterfaceError):
            # The caller already has the error that led here. Without its connection the transaction ends too.
            await connection.invalidate()
        finally:
            # As many as are taken at once. The next transaction gets the last one, which the server knows best.
            self._idle.append(connection)
            self._end_use(self._askers.pop(connection))

    def _end_use(self, asker: str) -> None:
        self.taken -= 1
        self._places.give(asker)

    @asynccontextmanager
    async def statements(self) -> AsyncIterator[AsyncConnection]:
        """A connection for single statements: each is a transaction of its own, without BEGIN and COMMIT."""
        connection = await self.take()
        try:
            yield connection
        finally:
            await self.give_back(connection)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """One transaction: committed when the block ends, rolled back when it raises."""
        async with self.statements() as connection:
            await begin(connection)
            yield connection
            await commit(connection)

    async def dispose(self, close: bool = True) -> None:
        while self._idle:
            await self._idle.pop().close()
        await super().dispose(close)


def create_engine(url: str, *, pool_size: int = 10, name: str = "clawbus", schema: str | None = None) -> Pool:
    """A pool of connections to `url` (``postgresql://user:password@host:port/database``). It connects at first use.

    The URL may ask for TLS: ``?sslmode=verify-full&sslrootcert=FILE&sslcert=FILE&sslkey=FILE``.

    `schema`: the search path, for a role that has none of its own: an administrator, whose commands may take as long as
    all rows of a large system need.
    """
    parsed = make_url(url).set(drivername="postgresql+asyncpg")
    context, query = postgres_context(parsed.query)
    engine = create_async_engine(
        parsed.set(query=query),
        pool_size=pool_size + BESIDE_TRANSACTIONS,
        max_overflow=0,
        pool_timeout=POOL_TIMEOUT_SECONDS,
        # Errors are logged, and parameters can hold personal texts.
        hide_parameters=True,
        connect_args={
            **({"ssl": context} if context else {}),
            "timeout": 10,
            # More than the statements of a service, so that each is prepared once per connection.
            "statement_cache_size": 400,
            "server_settings": {
                "application_name": name,
                "timezone": "UTC",
                "idle_in_transaction_session_timeout": str(IDLE_IN_TRANSACTION_MS),
                **(
                    {"search_path": schema}
                    if schema
                    else {
                        "statement_timeout": str(STATEMENT_TIMEOUT_MS),
                        "transaction_timeout": str(TRANSACTION_TIMEOUT_MS),
                    }
                ),
            },
        },
    )
    event.listen(engine.sync_engine, "connect", _notice_silence)
    event.listen(engine.sync_engine, "checkout", _refuse_closed)
    return Pool(engine.sync_engine, pool_size)


def _notice_silence(connection: Any, _record: Any) -> None:
    """Lets the operating system ask the server whether it is there: a third of the time of silence, then twice more."""
    endpoint: socket.socket = connection.driver_connection._transport.get_extra_info("socket")
    endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Not every operating system has all of them.
    for name, value in (
        ("TCP_KEEPIDLE", SILENCE_SECONDS // 3),
        ("TCP_KEEPINTVL", SILENCE_SECONDS // 3),
        ("TCP_KEEPCNT", 2),
        # Data that was sent and is not confirmed, in milliseconds.
        ("TCP_USER_TIMEOUT", SILENCE_SECONDS * 1000),
    ):
        if option := getattr(socket, name, None):
            endpoint.setsockopt(socket.IPPROTO_TCP, option, value)


def _refuse_closed(connection: Any, _record: Any, _fairy: Any) -> None:
    """Makes the pool replace a connection that the server has closed (a restart), before anything is sent on it."""
    if connection.driver_connection.is_closed():
        raise DisconnectionError("closed by the server")


async def sql(connection: AsyncConnection, statement: str, *arguments: Any) -> Sequence[tuple[Any, ...]]:
    """Runs one statement with PostgreSQL's own ``$1`` parameters and returns its rows.

    In a transaction of SQLAlchemy the first statement goes through it, which begins the transaction. All others go
    straight to the driver, because SQLAlchemy's own work takes three times as long as the statement. Raises DBAPIError
    in both cases.

    Frequent statements read an array as ``(SELECT $1::text[])``. That hides its length: for an array of one element
    PostgreSQL would make a new plan at each execution, and that often takes longer than the execution.
    """
    driver = _driver(connection)
    if driver is None:
        if connection.invalidated:
            # SQLAlchemy would connect again, and the statement would not be part of the transaction.
            raise asyncpg.InterfaceError("the connection to the database was lost")
        result = await connection.exec_driver_sql(statement, arguments or None)
        return [tuple(row) for row in result] if result.returns_rows else ()
    began = perf_counter()
    try:
        return [tuple(row) for row in await driver.fetch(statement, *arguments)]
    except Exception as error:
        raise await _failure(connection, driver, statement, error) from error
    except BaseException:
        # After a cancellation the connection may be in the middle of a statement.
        await connection.invalidate()
        raise
    finally:
        STATEMENTS.took(perf_counter() - began)


async def begin(connection: AsyncConnection, tenant_id: str | None = None) -> None:
    """Begins a transaction on a connection that `Pool.take` has given, for a tenant if the role is bound by row-level
    security.

    The driver begins and ends it: SQLAlchemy's own work takes longer than the round trips.
    """
    command = "BEGIN"
    if tenant_id is not None:
        # Both in one round trip. The driver sends commands without parameters; hexadecimal digits need no quoting.
        name = f"convert_from('\\x{tenant_id.encode().hex()}', 'UTF8')"
        command += f"; SELECT set_config('claw.tenant', {name}, true)"
    await _command(connection, command)


async def commit(connection: AsyncConnection) -> None:
    """Commits the transaction that `begin` began.

    Raises DBAPIError, also if the transaction has failed before: the server would answer the commit with a rollback.
    """
    if await _command(connection, "COMMIT") != "COMMIT":
        raise asyncpg.InFailedSQLTransactionError("a statement of the transaction failed: nothing was committed")


async def _command(connection: AsyncConnection, command: str) -> str:
    """Runs a command without parameters and returns its tag."""
    driver = _driver(connection)
    if driver is None:
        raise asyncpg.InterfaceError("the connection to the database was lost in the transaction")
    began = perf_counter()
    try:
        tag: str = await driver.execute(command)
        return tag
    except Exception as error:
        raise await _failure(connection, driver, command, error) from error
    except BaseException:
        await connection.invalidate()
        raise
    finally:
        STATEMENTS.took(perf_counter() - began)


async def _failure(connection: AsyncConnection, driver: Any, statement: str, error: Exception) -> Exception:
    """The error to be raised for the driver's. Gives up the connection if the server has closed it."""
    lost = driver.is_closed()
    failure = _as_sqlalchemy(connection, statement, error, lost)
    if lost:
        await connection.invalidate(error)
    return failure


def _driver(connection: AsyncConnection) -> Any:
    """asyncpg's connection, if it is in a transaction or commits each statement. Otherwise None."""
    inner = connection.sync_connection
    if inner is None or inner.closed or inner.invalidated:
        return None
    pooled: Any = inner.connection
    driver = pooled.driver_connection
    return driver if driver.is_in_transaction() or pooled.dbapi_connection.autocommit else None


def _as_sqlalchemy(connection: AsyncConnection, statement: str, error: Exception, lost: bool) -> Exception:
    """The same error as SQLAlchemy raises, without PostgreSQL's details, which can hold personal texts."""
    dbapi: Any = connection.dialect.dbapi
    for kind in type(error).__mro__:
        if make := dbapi._asyncpg_error_translate.get(kind):
            translated = make(error.args[0], error)
            translated.__cause__ = error
            failure: Exception = DBAPIError.instance(
                statement,
                None,
                translated,
                dbapi.Error,
                hide_parameters=True,
                connection_invalidated=lost,
                dialect=connection.dialect,
            )
            return failure
    return error


def is_transient(error: BaseException) -> bool:
    """True for an error that passes by itself: `Transient`, or one of the database (see `is_of_database`)."""
    return isinstance(error, Transient) or is_of_database(error)


def is_of_database(error: BaseException) -> bool:
    """True for a transient error of the database: a lost connection, a deadlock, a time-out, a full pool …"""
    if isinstance(error, PoolTimeoutError):
        return True
    if isinstance(error, DBAPIError):
        if error.connection_invalidated:
            return True
        error = error.orig.__cause__ or error.orig if error.orig else error
    if isinstance(error, (asyncpg.InvalidCachedStatementError, asyncpg.OutdatedSchemaCacheError)):
        # A migration has changed a table meanwhile. The driver has forgotten the statement, and prepares it again.
        return True
    if isinstance(error, asyncpg.PostgresError):
        return str(getattr(error, "sqlstate", "")).startswith(_TRANSIENT_STATES)
    return isinstance(error, (OSError, TimeoutError, asyncpg.InterfaceError))


def sqlstate(error: DBAPIError) -> str | None:
    """The server's code of the error; None if it comes from the driver."""
    return getattr(error.orig.__cause__, "sqlstate", None) if error.orig else None


def message(error: DBAPIError) -> str:
    """The server's own text of the error."""
    return str(error.orig.__cause__) if error.orig else str(error)


def is_bad_data(error: BaseException) -> bool:
    """True if PostgreSQL or its driver refused a value: NUL in a text, a number or a time out of range …"""
    if isinstance(error, DBAPIError) and error.orig:
        error = error.orig.__cause__ or error.orig
    if isinstance(error, asyncpg.PostgresError):
        # Class 22 of SQLSTATE: data exceptions.
        return str(getattr(error, "sqlstate", "")).startswith("22")
    return isinstance(error, asyncpg.DataError)


def storable(text: str, limit: int | None = None) -> str:
    """`text` as PostgreSQL can store it: NUL is escaped, and at most `limit` characters are kept."""
    return text.replace("\x00", "\\x00")[:limit]
