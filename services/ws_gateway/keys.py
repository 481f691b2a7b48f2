"""Asks the user service for the present scopes of a client's key."""

from __future__ import annotations

import grpc.aio

from infra.security.auth import Identity
from infra.web import rpc
from protos.user.v1 import user_pb2, user_pb2_grpc

SAFE = ("clawbus.user.v1.Keys/Scopes",)


class Keys:
    """`channel` leads to the user service."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._keys = user_pb2_grpc.KeysStub(channel)

    async def scopes(self, who: Identity) -> frozenset[str]:
        """The client's present scopes; empty if its key was revoked or has expired. Raises Transient."""
        if who.actor == "operator":
            return who.scopes
        request = user_pb2.ScopesRequest(key_id=who.key_id)
        reply = await self._keys.Scopes(request, metadata=rpc.tenant_metadata(who.tenant_id))
        return frozenset(reply.scopes)
