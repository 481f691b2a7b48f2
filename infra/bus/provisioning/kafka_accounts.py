"""Accounts of a Kafka that asks for logins: one for each service, with the rights to its own topics and groups only."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.admin import CreateAclsRequest_v1, DeleteAclsRequest_v1, DescribeAclsRequest_v1
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import (
    CompactArray,
    CompactBytes,
    CompactString,
    Int8,
    Int16,
    Int32,
    Schema,
    TaggedFields,
)

from infra.bus.provisioning.drift import ProvisioningError
from infra.connections import kafka_options

_SCRAM_SHA_512 = 2
# Kafka's least. The passwords are random, so more would only cost time at each connection.
_ITERATIONS = 4096
# Kafka's numbers of resource types, kinds of pattern, operations and permissions.
_ANY, _TOPIC, _GROUP = 1, 2, 3
_LITERAL, _PREFIXED = 3, 4
_READ, _WRITE = 3, 4
_ALLOW = 3


class Rights(NamedTuple):
    """The topics of a service."""

    reads: frozenset[str]
    writes: frozenset[str]


class _Acl(NamedTuple):
    resource_type: int
    name: str
    pattern: int
    principal: str
    host: str
    operation: int
    permission: int


async def grant(servers: str, passwords: Mapping[str, str], rights: Mapping[str, Rights]) -> None:
    """Sets the passwords (SCRAM-SHA-512), adds missing rights and takes away all others of these accounts.

    servers: of the administrator. A service may use the consumer groups whose names begin with its own. Raises
    ProvisioningError if Kafka refuses.
    """
    admin = AIOKafkaAdminClient(**kafka_options(servers))
    try:
        await admin.start()
        made = await _ask(admin, _AlterUsers([_scram(name, password) for name, password in passwords.items()]))
        _check((code, f"{name}: {message}") for name, code, message, _ in made.results)
        wanted = {acl for name, of in rights.items() for acl in _acls(name, of)}
        found = await _found(admin, {_principal(name) for name in rights})
        # Added first: a service that runs must not lose a right that it keeps.
        if missing := sorted(wanted - found):
            _check((await _ask(admin, _Create(missing))).creation_responses)
        if extra := sorted(found - wanted):
            _check(answer[:2] for answer in (await _ask(admin, _Delete(extra))).filter_responses)
    finally:
        await admin.close()


def _acls(service: str, rights: Rights) -> list[_Acl]:
    # To write or read a topic includes to see it, and to write one includes an idempotent producer.
    topics = [(topic, _READ) for topic in rights.reads] + [(topic, _WRITE) for topic in rights.writes]
    principal = _principal(service)
    return [
        *(_Acl(_TOPIC, topic, _LITERAL, principal, "*", operation, _ALLOW) for topic, operation in topics),
        _Acl(_GROUP, service, _PREFIXED, principal, "*", _READ, _ALLOW),
    ]


def _principal(service: str) -> str:
    return f"User:{service}"


def _scram(name: str, password: str) -> tuple[Any, ...]:
    salt = secrets.token_bytes(32)
    salted = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _ITERATIONS)
    return (name, _SCRAM_SHA_512, _ITERATIONS, salt, salted, {})


def _check(results: Any) -> None:
    if failures := [f"{message} (error {code})" for code, message in results if code]:
        raise ProvisioningError("Kafka's accounts: " + "; ".join(failures))


async def _found(admin: Any, principals: set[str]) -> set[_Acl]:
    answer = await _ask(admin, _Describe())
    _check([(answer.error_code, answer.error_message)])
    return {
        _Acl(type_, name, pattern, *entry)
        for type_, name, pattern, entries in answer.resources
        for entry in entries
        if entry[0] in principals
    }


async def _ask(admin: Any, request: Any) -> Any:
    return await admin._client.send(admin._client.get_random_node(), request)


class _AlterUsersResponse(Response):  # type: ignore[misc]  # aiokafka is untyped
    API_KEY = 51
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "results",
            CompactArray(
                ("user", CompactString("utf-8")),
                ("error_code", Int16),
                ("error_message", CompactString("utf-8")),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _AlterUsersV0(RequestStruct):  # type: ignore[misc]  # aiokafka is untyped
    """https://kafka.apache.org/protocol.html, AlterUserScramCredentials."""

    API_KEY = 51
    API_VERSION = 0
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = _AlterUsersResponse
    SCHEMA = Schema(
        (
            "deletions",
            CompactArray(("name", CompactString("utf-8")), ("mechanism", Int8), ("tags", TaggedFields)),
        ),
        (
            "upsertions",
            CompactArray(
                ("name", CompactString("utf-8")),
                ("mechanism", Int8),
                ("iterations", Int32),
                ("salt", CompactBytes),
                ("salted_password", CompactBytes),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _AlterUsers(Request[_AlterUsersV0]):  # type: ignore[misc]  # aiokafka is untyped
    API_KEY = 51

    def __init__(self, upserts: Sequence[tuple[Any, ...]]) -> None:
        self._upserts = upserts

    def build(self, request_struct_class: Any) -> Any:
        return request_struct_class([], self._upserts, {})


class _Describe(Request[DescribeAclsRequest_v1]):  # type: ignore[misc]  # aiokafka is untyped
    """All rights of all accounts."""

    API_KEY = 29

    def build(self, request_struct_class: Any) -> Any:
        return request_struct_class(_ANY, None, _ANY, None, None, _ANY, _ANY)


class _Create(Request[CreateAclsRequest_v1]):  # type: ignore[misc]  # aiokafka is untyped
    API_KEY = 30

    def __init__(self, acls: Sequence[_Acl]) -> None:
        self._acls = acls

    def build(self, request_struct_class: Any) -> Any:
        return request_struct_class(self._acls)


class _Delete(Request[DeleteAclsRequest_v1]):  # type: ignore[misc]  # aiokafka is untyped
    API_KEY = 31

    def __init__(self, acls: Sequence[_Acl]) -> None:
        self._acls = acls

    def build(self, request_struct_class: Any) -> Any:
        return request_struct_class(self._acls)
