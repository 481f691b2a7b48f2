"""Bad input to the two kinds of entry that no OpenAPI page shows: gRPC methods, and the webhooks of vendors."""

from __future__ import annotations

import asyncio
import importlib
import math
import random
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import grpc
import httpx
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from protos.calls import METHODS, AllowedCallers
from services.channel.vendors import VENDORS
from tests.security.bad_input import BODIES, CONTENT_TYPES, HEADERS, TEXTS, URL, URL_TEXTS
from tests.security.furnished import asked
from tests.services.channel.vendors.mutated import MADE, changed
from tooling.stack.home import SERVICES
from tooling.testing import keys
from tooling.testing.platform import Platform

pytestmark = pytest.mark.asyncio(loop_scope="package")

FROM_EACH = 12
"""The number of bad messages to each method and of bad calls to each vendor's webhook, spread over all."""
FAULTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED)
RAW = (b"\xff" * 5, b"\x0a\xff\xff\xff\xff\x0f", b"\x08", b"\x0a\x02\xff\xff", b"\0" * 20)
_NUMBERS = (0, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 2**64 - 1, math.nan, math.inf, -math.inf, 1e308)


async def test_bad_messages_to_grpc_methods_are_refused_and_never_an_error_of_the_service(system: Platform) -> None:
    tenant = (await asked(system, "user", "", "POST", "/api/v1/tenants", {"name": "Bad calls"}))["id"]
    few = asyncio.Semaphore(8)

    async def failure(method: str, call: AllowedCallers, owner: str, body: bytes, channel: Any) -> str | None:
        token = keys.callers(call.callers[0]).token(owner, "" if call.behalf == "operator" else tenant)
        async with few:
            try:
                await channel.unary_unary(f"/{method}")(
                    body, metadata=(("authorization", f"Bearer {token}"),), timeout=60
                )
            except grpc.aio.AioRpcError as error:
                if error.code() in FAULTS:
                    return f"{method} {body[:200]!r}: {error.code()} {error.details()}"
        return None

    problems, made = [], 0
    for method, call in METHODS.items():
        owner = method.removeprefix("clawbus.").partition(".")[0]
        owner = "agent" if owner == "ops" else owner
        if owner not in SERVICES:
            continue
        messages = [message.SerializeToString() for message in bad_messages(request_of(method))]
        chosen = [*RAW, *messages[:: max(1, len(messages) // FROM_EACH)]]
        made += len(chosen)
        async with grpc.aio.insecure_channel(system.grpc(owner)) as channel:
            found = await asyncio.gather(*(failure(method, call, owner, body, channel) for body in chosen))
        problems += [line for line in found if line]
    assert made > 300
    assert problems == [], "\n".join(problems)


def request_of(method: str) -> Descriptor:
    package, _, name = method.partition("/")
    _, owner, version, service = package.split(".")
    module = importlib.import_module(f"protos.{owner}.{version}.{owner}_pb2")
    return module.DESCRIPTOR.services_by_name[service].methods_by_name[name].input_type  # type: ignore[no-any-return]


def bad_messages(descriptor: Descriptor) -> Iterator[Message]:
    """An empty message, and good ones with one bad field."""
    yield GetMessageClass(descriptor)()
    for field in descriptor.fields:
        for value in _bad(field, descriptor):
            message = good(descriptor)
            if field.message_type and field.message_type.GetOptions().map_entry:
                getattr(message, field.name)[value.key] = value.value
            elif field.is_repeated:
                getattr(message, field.name).extend(value if isinstance(value, list) else [value])
            elif field.message_type:
                getattr(message, field.name).CopyFrom(value)
            else:
                try:
                    setattr(message, field.name, value)
                except (TypeError, ValueError):
                    # The type of the field cannot hold it.
                    continue
            yield message


def _bad(field: FieldDescriptor, owner: Descriptor) -> Iterator[Any]:
    if field.message_type:
        yield from bad_messages(field.message_type)
        return
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            values: tuple[Any, ...] = tuple(text for text in TEXTS if "\ud800" not in text)
        case FieldDescriptor.CPPTYPE_BOOL:
            values = (True,)
        case FieldDescriptor.CPPTYPE_ENUM:
            values = (99,)
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            values = _NUMBERS
        case _:
            values = tuple(number for number in _NUMBERS if isinstance(number, int))
    for value in values:
        if field.is_repeated:
            try:
                GetMessageClass(owner)(**{field.name: [value]})
            except (TypeError, ValueError):
                continue
        yield value
    if field.is_repeated:
        yield list(values[:1]) * 5_000


def good(descriptor: Descriptor) -> Message:
    """Each field of the message has a plain value."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if field.is_repeated or field.message_type or field.containing_oneof:
            continue
        plain = {FieldDescriptor.CPPTYPE_STRING: str(uuid4()), FieldDescriptor.CPPTYPE_BOOL: False}
        setattr(message, field.name, plain.get(field.cpp_type, 1))
    return message


async def test_bad_calls_of_webhooks_are_refused_and_never_an_error_of_the_service(
    system: Platform, http: dict[str, httpx.AsyncClient]
) -> None:
    tenant = (await asked(system, "user", "", "POST", "/api/v1/tenants", {"name": "Bad webhooks"}))["id"]
    body = {"name": "a", "model": "scripted/answer"}
    agent = (await asked(system, "agent", tenant, "POST", "/api/v1/agents", body))["id"]
    few, chance = asyncio.Semaphore(8), random.Random(1)
    # Its keys are published at an address of the vendor, which does not answer here.
    unanswered = {"teams"}

    async def failure(name: str, method: str, url: str, content: bytes, headers: dict[str, str]) -> str | None:
        raw = [(key.encode(), value.encode("latin-1")) for key, value in headers.items()]
        async with few:
            answer = await http["channel"].request(method, url, content=content, headers=raw)
        if answer.status_code < 500 or (answer.status_code == 503 and name in unanswered):
            return None
        return f"{method} {url[:200]} {headers} {content[:300]!r}: {answer.status_code} {answer.text}"

    calls, genuine = [], []
    for name in VENDORS:
        credentials, contents, make = MADE[name]
        account = {"type": name, "agent_id": agent, "credentials": credentials}
        if VENDORS[name].origin:
            account["api_base"] = URL
        path = (await asked(system, "channel", tenant, "POST", "/api/v1/channels", account))["webhook_path"]
        for n in range(FROM_EACH):
            strange = contents[0] if n == 0 else changed(chance.choice(contents), chance)
            try:
                request = make(strange)
            except UnicodeEncodeError:
                continue  # half a character: no vendor can send that
            url = path + (f"?{request.query}" if request.query else "")
            genuine.append(failure(name, "POST", url, request.body, dict(request.headers)))
        kind = {"content-type": "application/json"}
        calls += [failure(name, "POST", path, raw, kind) for raw in BODIES]
        calls += [failure(name, "POST", path, b"{}", {"content-type": text}) for text in CONTENT_TYPES]
        calls += [failure(name, "POST", f"{path}?{field}={text}", b"{}", kind) for field, text in _query(chance)]
        calls += [failure(name, "POST", path, b"{}", kind | {header: text}) for header, text in _headers(chance)]
        calls += [failure(name, method, path, b"", {}) for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS")]
        calls += [failure(name, "POST", f"/webhooks/{name}/{text}", b"{}", kind) for text in URL_TEXTS[:6]]
    calls += [failure("", "POST", f"/webhooks/{text}", b"{}", {}) for text in ("", "/", *URL_TEXTS)]
    assert len(genuine) > 100
    problems = [line for line in await asyncio.gather(*genuine, *calls) if line]
    assert problems == [], "\n".join(problems)


def _query(chance: random.Random) -> list[tuple[str, str]]:
    names = ("timestamp", "nonce", "msg_signature", "signature", "echostr", "hub.challenge")
    return [(chance.choice(names), text) for text in URL_TEXTS[:6]]


def _headers(chance: random.Random) -> list[tuple[str, str]]:
    names = (
        *("x-slack-request-timestamp", "x-slack-signature", "x-line-signature", "x-twilio-signature"),
        *("x-signature-timestamp", "x-signature-ed25519", "x-hub-signature-256", "authorization", "timestamp", "sign"),
        *("webhook-timestamp", "webhook-signature", "x-lark-signature", "x-bot-appid", "traceparent"),
    )
    return [(chance.choice(names), text) for text in HEADERS]
