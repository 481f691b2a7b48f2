"""Builds the mailer, the table and the client of the user service for notification."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from infra.service.service import Runtime
from infra.web import rpc
from protos.user.v1 import user_pb2, user_pb2_grpc
from services.notification.mailer import Mailer
from services.notification.notifications import Notifications

Owners = Callable[[str], Awaitable[list[str]]]
"""The e-mail addresses of a tenant's owners."""


def notifications(runtime: Runtime) -> Notifications:
    return Notifications(runtime.cipher)


def mailer(runtime: Runtime) -> Mailer:
    return Mailer(runtime.settings.smtp_url.get_secret_value(), runtime.settings.mail_from)


def owners(runtime: Runtime) -> Owners:
    channel = runtime.channels.to(runtime.settings.user_grpc, "user", safe=["clawbus.user.v1.Directory/Owners"])
    directory = user_pb2_grpc.DirectoryStub(channel)

    async def ask(tenant_id: str) -> list[str]:
        reply = await directory.Owners(user_pb2.OwnersRequest(), metadata=rpc.tenant_metadata(tenant_id))
        return list(reply.emails)

    return ask
