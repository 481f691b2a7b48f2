"""The gRPC services of the user service: the owners' addresses, and the scopes of a key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from uuid import UUID

from infra.errors import InvalidMessage, Unauthenticated
from infra.security.subjects import SubjectKeys
from infra.service.service import Runtime
from infra.web import rpc
from protos.user.v1 import user_pb2, user_pb2_grpc
from services.user import api_keys, members


class DirectoryRpc(user_pb2_grpc.DirectoryServicer):
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._subjects = SubjectKeys(runtime.cipher)

    async def Owners(self, request: user_pb2.OwnersRequest, context: Any) -> user_pb2.OwnersReply:
        tenant_id = rpc.tenant()
        async with self._runtime.request.begin(tenant_id=tenant_id) as tx:
            return user_pb2.OwnersReply(emails=await members.owners_emails(tx, self._subjects, tenant_id))


class KeysRpc(user_pb2_grpc.KeysServicer):
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    async def Scopes(self, request: user_pb2.ScopesRequest, context: Any) -> user_pb2.ScopesReply:
        # Only ws_gateway calls this. A client that has never come to ws_gateway has no such token.
        try:
            who = self._runtime.identities.introduced(request.token, "ws_gateway")
        except Unauthenticated as error:
            raise InvalidMessage("token", str(error)) from error
        tenant_id = rpc.tenant()
        if who.tenant_id != tenant_id or who.key_id != request.key_id:
            raise InvalidMessage("token", "must be the token of this key of this tenant")
        if who.actor != "operator":
            async with self._runtime.request.begin(tenant_id=tenant_id) as tx:
                who = replace(who, scopes=await api_keys.present_scopes(tx, tenant_id, UUID(who.key_id)))
        if not who.scopes:
            return user_pb2.ScopesReply()
        token = self._runtime.identities.token(who, "ws_gateway")
        return user_pb2.ScopesReply(scopes=sorted(who.scopes), token=token)


def directory(runtime: Runtime) -> tuple[Callable[[Any, Any], None], DirectoryRpc]:
    return user_pb2_grpc.add_DirectoryServicer_to_server, DirectoryRpc(runtime)


def keys(runtime: Runtime) -> tuple[Callable[[Any, Any], None], KeysRpc]:
    return user_pb2_grpc.add_KeysServicer_to_server, KeysRpc(runtime)
