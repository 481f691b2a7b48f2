"""The servers of the ingest bench, each a process: ``python -m … ours|orm <port> <database url> <OTLP endpoint>``.

`empty` is an ASGI application for granian that reads a POST and answers 200.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any

import pydantic
import uvicorn
import uvloop
from fastapi import FastAPI, Header, Request
from prometheus_client import CollectorRegistry
from sqlalchemy import func
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from infra.clock import utcnow
from infra.observe import logs, telemetry
from infra.observe.metrics import Metrics
from infra.outgoing import webhooks
from infra.outgoing.client import Outgoing
from infra.postgres.database import Database
from infra.postgres.db import Pool, create_engine
from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys
from infra.service.process import freeze_loaded_modules
from infra.web import http
from infra.web.server import serve_http
from services.channel.accounts.store import Accounts, AccountSecrets
from services.channel.intake.drainer import Drainer
from services.channel.intake.ingest import Ingest
from services.channel.intake.webhooks import Webhooks, route

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


async def empty(scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
    if scope["type"] != "http":
        return
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


async def serve_ours(port: int, engine: Pool, otlp: str) -> None:
    """The channel's route in the kernel's application, traced as in production. Only the relays are missing."""
    logs.setup("channel", "info")
    telemetry.setup("channel", "0", otlp)
    cipher = Cipher(os.environ["CLAW_MASTER_KEY"])
    database = Database(engine, "channel")
    metrics = Metrics(CollectorRegistry())
    ingest = Ingest(database, cipher, SubjectKeys(cipher))
    channel = Webhooks(Accounts(database, AccountSecrets(cipher)), ingest, metrics, Outgoing(allow_private=False), "")
    app = http.create_app([], http.Health("channel", "0"), metrics)
    await serve_http(app, port, raw=[route(channel)])
    await Drainer(ingest).run()


class _Base(DeclarativeBase):
    pass


class Taken(_Base):
    """The one row that the anchor writes: the smallest amount of durable work."""

    __tablename__ = "taken"

    id: Mapped[str] = mapped_column(primary_key=True)
    conversation: Mapped[str]
    person: Mapped[str]
    text: Mapped[str]
    at: Mapped[datetime] = mapped_column(server_default=func.now())


class Message(pydantic.BaseModel):
    conversation_id: str
    user_id: str
    text: str


async def serve_orm(port: int, engine: AsyncEngine, _: str) -> None:
    """The usual first version of such a server: FastAPI, a model, a session and a commit for each request."""
    async with engine.begin() as connection:
        await connection.run_sync(_Base.metadata.create_all)
    app = FastAPI()
    sessions = async_sessionmaker(engine)

    @app.post("/webhooks")
    async def take(request: Request, message: Message, webhook_id: Annotated[str, Header()]) -> None:
        webhooks.verify(SECRET, request.headers, await request.body(), utcnow())
        async with sessions() as session:
            session.add(
                Taken(id=webhook_id, conversation=message.conversation_id, person=message.user_id, text=message.text)
            )
            try:
                await session.commit()
            except IntegrityError:
                await session.rollback()

    config = uvicorn.Config(app, port=port, log_config=None, access_log=False, lifespan="off")
    await uvicorn.Server(config).serve()


if __name__ == "__main__":
    freeze_loaded_modules()
    which, number, url, endpoint = sys.argv[1:]
    uvloop.run((serve_ours if which == "ours" else serve_orm)(int(number), create_engine(url), endpoint))
