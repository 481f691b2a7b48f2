"""The notification service as a process, with a test mail server and a test directory."""

from __future__ import annotations

import email.policy
from collections.abc import AsyncIterator
from email.message import EmailMessage
from email.parser import BytesParser
from typing import Any
from uuid import UUID, uuid4

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Session
from aiosmtpd.smtp import Envelope as Mail
from prometheus_client import CollectorRegistry

from infra.observe.metrics import Metrics
from infra.web import rpc
from protos.catalog import NOTIFICATION_EMAIL
from protos.messages.notification import Attachment, SendEmail
from protos.user.v1 import user_pb2, user_pb2_grpc
from tooling.testing import keys
from tooling.testing.platform import Platform
from tooling.testing.stack import free_port


class Inbox:
    """A mail server: refuses ``gone-…`` permanently, ``full-…`` always for now and ``busy-…`` the first time, and keeps
    the rest.

    `refused` has the Message-ID of each refused e-mail, by recipient.
    """

    def __init__(self) -> None:
        self.mails: list[tuple[str, EmailMessage]] = []
        self.refused: dict[str, str] = {}
        self._controller: Controller | None = None
        self.port = free_port()

    def start(self) -> None:
        self._controller = Controller(self, hostname="127.0.0.1", port=self.port)
        self._controller.start()

    def stop(self) -> None:
        assert self._controller is not None
        self._controller.stop()

    async def handle_RCPT(self, server: SMTP, session: Session, mail: Mail, address: str, options: list[str]) -> str:
        if address.startswith("gone-"):
            return f"550 5.1.1 <{address}> no such user"
        if address.startswith("full-"):
            return f"452 4.2.2 <{address}> mailbox full"
        mail.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, mail: Mail) -> str:
        assert isinstance(mail.content, bytes)
        parsed = BytesParser(policy=email.policy.default).parsebytes(mail.content)
        assert isinstance(parsed, EmailMessage)
        for recipient in mail.rcpt_tos:
            if recipient.startswith("busy-") and recipient not in self.refused:
                self.refused[recipient] = parsed["Message-ID"]
                return f"451 4.3.0 <{recipient}> try again later"
        self.mails += [(recipient, parsed) for recipient in mail.rcpt_tos]
        return "250 OK"

    def of(self, recipient: str) -> list[EmailMessage]:
        return [mail for to, mail in self.mails if to == recipient]


class Directory(user_pb2_grpc.DirectoryServicer):
    """The owners' addresses by tenant."""

    def __init__(self) -> None:
        self.owners: dict[str, list[str]] = {}

    async def Owners(self, request: user_pb2.OwnersRequest, context: Any) -> user_pb2.OwnersReply:
        return user_pb2.OwnersReply(emails=self.owners.get(rpc.tenant(), []))


class World:
    """A running notification service with its mail server and directory."""

    def __init__(self, platform: Platform, inbox: Inbox, directory: Directory) -> None:
        self.platform = platform
        self.inbox = inbox
        self.directory = directory

    async def start(self, **environment: str) -> None:
        await self.platform.start("notification", CLAW_SMTP_URL=f"smtp://127.0.0.1:{self.inbox.port}", **environment)

    async def send(
        self, tenant_id: str, to: str, subject: str = "Hello", text: str = "Text\n", file: Attachment | None = None
    ) -> UUID:
        message = SendEmail(to=to, subject=subject, text=text, attachment=file)
        return await self.platform.send(NOTIFICATION_EMAIL, message, tenant_id=tenant_id)

    async def listed(self, tenant_id: str, **query: Any) -> Any:
        async with self.platform.client("notification", tenant_id, scopes=("read",)) as client:
            response = await client.get("/api/v1/notifications", params=query)
        assert response.status_code == 200, response.text
        return response.json()

    async def ended(self, tenant_id: str, id_: UUID) -> dict[str, Any]:
        """Waits until the notification is no longer queued, and returns it as the API shows it."""

        async def found() -> dict[str, Any] | None:
            items = (await self.listed(tenant_id))["items"]
            return next((item for item in items if item["id"] == str(id_) and item["state"] != "queued"), None)

        item = await self.platform.until(found)
        assert item is not None
        return item

    async def sql(self, statement: str, *arguments: Any) -> Any:
        async with self.platform.database("notification").begin() as tx:
            return await tx.sql(statement, *arguments)


@pytest.fixture(scope="module")
async def world(platform: Platform) -> AsyncIterator[World]:
    await platform.prepare("notification")
    inbox, directory = Inbox(), Directory()
    inbox.start()
    server = rpc.Server("user", keys.callers("user"), Metrics(CollectorRegistry()))
    user_pb2_grpc.add_DirectoryServicer_to_server(directory, server.grpc)
    await server.start(platform.ports["user_grpc"])
    world = World(platform, inbox, directory)
    await world.start()
    yield world
    platform.stop("notification")
    await server.stop()
    inbox.stop()


def tenant() -> str:
    return uuid4().hex


def address(kind: str = "owner") -> str:
    return f"{kind}-{uuid4().hex[:12]}@example.com"
