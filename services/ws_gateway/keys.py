"""Asks the user service for the present scopes and a new token of a client."""

from __future__ import annotations

from dataclasses import replace

import grpc.aio

from infra.security.auth import Identity
from infra.web import rpc
from protos.user.v1 import user_pb2, user_pb2_grpc

SAFE = ("clawbus.user.v1.Keys/Scopes",)


class ApiKeys:
    """`channel` leads to the user service."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._keys = user_pb2_grpc.KeysStub(channel)

    async def renewed(self, who: Identity) -> Identity:
        """The client as it is now; without scopes if its key was revoked or has expired. Raises Transient."""
        request = user_pb2.ScopesRequest(key_id=who.key_id, token=who.token)
        reply = await self._keys.Scopes(request, metadata=rpc.tenant_metadata(who.tenant_id))
        return replace(who, scopes=frozenset(reply.scopes), token=reply.token)
