"""Calls between services over real gRPC: deadlines, callers, traces, errors, retries, drain."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import CollectorRegistry

from infra.errors import (
    Conflict,
    Forbidden,
    InvalidMessage,
    NotFound,
    RetryLater,
    TooLarge,
    Transient,
    Unauthenticated,
)
from infra.observe import logs, telemetry
from infra.observe.metrics import Metrics
from infra.outgoing import shares
from infra.web import rpc
from infra.web.rpc import Server
from infra.web.rpc_client import DEFAULT_TIMEOUT_SECONDS, Channels
from protos.calls import AllowedCallers
from tooling.testing import keys
from tooling.testing.proxy import FaultProxy

SERVICE = "clawbus.test.v1.Test"
METHODS = {
    f"{SERVICE}/Echo": AllowedCallers(("agent",), "either"),
    f"{SERVICE}/Repeat": AllowedCallers(("agent",), "either"),
    f"{SERVICE}/Count": AllowedCallers(("agent",), "either"),
    f"{SERVICE}/OfTenant": AllowedCallers(("agent", "plugin"), "tenant"),
    f"{SERVICE}/OfOperator": AllowedCallers(("agent",), "operator"),
}
ERRORS: dict[str, Exception] = {
    "invalid": InvalidMessage("prix.montant_é", "negative"),
    "unauthenticated": Unauthenticated("no key"),
    "forbidden": Forbidden("not yours"),
    "not-found": NotFound("agent a1"),
    "conflict": Conflict("version 3, not 2"),
    "too-large": TooLarge("over 5 MB"),
    "transient": Transient("the index is away"),
    "later": RetryLater(timedelta(seconds=7)),
    "database": ConnectionRefusedError("postgresql://u:hunter2@h"),
    "bug": ValueError("hunter2"),
}


class Service:
    """A servicer of bytes that records requests and answers as the test asks."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.caller = ""
        self.tenant: str | None = None
        self.left = 0.0
        self.carrier: dict[str, str] = {}
        self.fail_times = 0
        self.entered = asyncio.Event()
        self.go = asyncio.Event()
        self.next: grpc.aio.Channel | None = None

    async def echo(self, request: bytes, context: Any) -> bytes:
        self.asked.append(request.decode())
        self.tenant = rpc.tenant_if_any()
        assert shares.tenant.get() == logs._work.get().get("for_tenant", "") == (self.tenant or "")
        self.caller, self.left, self.carrier = rpc.caller(), context.time_remaining(), telemetry.carrier()
        if self.fail_times:
            self.fail_times -= 1
            raise Transient("not yet")
        if error := ERRORS.get(request.decode()):
            raise error
        if request == b"abort":
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, "by itself")
        if request == b"wait":
            self.entered.set()
            await self.go.wait()
        if request == b"forward" and self.next:
            return await call(self.next, b"forwarded", timeout=60)
        return request

    async def count(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        self.caller = rpc.caller()
        for n in range(int(request)):
            yield str(n).encode()
        if request == b"2":
            raise NotFound("a third")

    def add_to(self, server: grpc.aio.Server) -> None:
        handlers: dict[str, Any] = {
            "Echo": grpc.unary_unary_rpc_method_handler(self.echo),
            **dict.fromkeys(
                ("Repeat", "OfTenant", "OfOperator", "NotListed"), grpc.unary_unary_rpc_method_handler(self.echo)
            ),
            "Count": grpc.unary_stream_rpc_method_handler(self.count),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


async def call(
    channel: grpc.aio.Channel, request: bytes, *, method: str = "Echo", timeout: float | None = None
) -> bytes:
    return await unary(channel, method)(request, timeout=timeout)


def unary(channel: grpc.aio.Channel, method: str = "Echo") -> grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]:
    return channel.unary_unary(f"/{SERVICE}/{method}")


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    running = telemetry.setup("memory", "1", None, processor=SimpleSpanProcessor(exporter))
    yield exporter
    running.shutdown()


@pytest.fixture
async def service() -> Service:
    return Service()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


@pytest.fixture
async def port(service: Service, metrics: Metrics) -> AsyncIterator[int]:
    server = Server("memory", keys.callers("memory"), metrics, METHODS)
    service.add_to(server.grpc)
    yield await server.start(0)
    service.go.set()
    await server.stop()


@pytest.fixture
async def channels() -> AsyncIterator[Channels]:
    channels = Channels(keys.callers("agent"))
    yield channels
    await channels.close()


@pytest.fixture
async def channel(channels: Channels, port: int) -> grpc.aio.Channel:
    return channels.to(f"127.0.0.1:{port}", "memory", safe=[f"{SERVICE}/Repeat"])


@pytest.fixture
async def bare(port: int) -> AsyncIterator[grpc.aio.Channel]:
    """A channel without our interceptors."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel


def metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def test_a_call_carries_its_caller_and_a_deadline(channel: grpc.aio.Channel, service: Service) -> None:
    assert await call(channel, b"hello") == b"hello"
    assert service.caller == "agent"
    # On the wire a time-out is rounded up.
    assert 0 < service.left < DEFAULT_TIMEOUT_SECONDS + 1
    await call(channel, b"hello", timeout=60)
    assert DEFAULT_TIMEOUT_SECONDS + 1 < service.left < 61
    with pytest.raises(LookupError):
        rpc.caller()


async def test_a_call_without_a_deadline_is_refused(bare: grpc.aio.Channel, service: Service) -> None:
    token = keys.callers("agent").token("memory")
    with pytest.raises(grpc.aio.AioRpcError, match="deadline: missing") as caught:
        await unary(bare)(b"x", metadata=metadata(token))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert service.asked == []


@pytest.mark.parametrize("token", ["", "stranger", "for another"])
async def test_a_call_without_a_valid_token_is_refused(bare: grpc.aio.Channel, service: Service, token: str) -> None:
    made = keys.callers("agent").token("billing") if token == "for another" else token
    given = metadata(made) if made else None
    with pytest.raises(grpc.aio.AioRpcError, match="token") as caught:
        await unary(bare)(b"x", timeout=5, metadata=given)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert service.asked == []


async def test_a_method_is_called_by_its_callers_for_a_tenant_or_the_operator_as_the_table_says(
    channels: Channels, port: int, service: Service
) -> None:
    plugin, user = Channels(keys.callers("plugin")), Channels(keys.callers("user"))
    one, other, third = (c.to(f"127.0.0.1:{port}", "memory") for c in (channels, plugin, user))
    t1 = rpc.tenant_metadata("t1")
    for channel in (one, other):
        assert await unary(channel, "OfTenant")(b"x", metadata=t1) == b"x"
        assert service.tenant == "t1"
    assert await unary(one, "OfOperator")(b"x") == b"x"
    assert service.tenant is None
    service.asked.clear()
    for channel, method, metadata_, reason in (
        (third, "OfTenant", t1, "user must not call clawbus.test.v1.Test/OfTenant"),
        (other, "OfOperator", None, "plugin must not call"),
        (one, "NotListed", None, "agent must not call"),
        (one, "OfTenant", None, "must be called for a tenant"),
        (one, "OfOperator", t1, "must be called for the operator"),
    ):
        with pytest.raises(Forbidden, match=reason):
            await unary(channel, method)(b"x", metadata=metadata_)
    assert service.asked == []
    await plugin.close()
    await user.close()


async def test_the_tenant_is_the_tokens_and_not_a_headers(bare: grpc.aio.Channel, service: Service) -> None:
    token = keys.callers("agent").token("memory", "t1")
    given = (*metadata(token), ("claw-tenant", "t2"))
    await unary(bare, "OfTenant")(b"x", timeout=5, metadata=given)
    assert service.tenant == "t1"


async def test_a_call_within_a_call_has_only_the_remaining_time(channel: grpc.aio.Channel, service: Service) -> None:
    service.next = channel
    assert await call(channel, b"forward", timeout=3) == b"forwarded"
    assert service.asked == ["forward", "forwarded"]
    # Without the limit it would be the inner call's own sixty seconds.
    assert service.left < 4


@pytest.mark.parametrize("how", ["invalid", "unauthenticated", "forbidden", "not-found", "conflict", "too-large"])
async def test_an_error_crosses_the_wire(channel: grpc.aio.Channel, how: str) -> None:
    with pytest.raises(type(ERRORS[how])) as caught:
        await call(channel, how.encode())
    assert str(caught.value) == str(ERRORS[how])
    if isinstance(caught.value, InvalidMessage):
        assert (caught.value.field, caught.value.reason) == ("prix.montant_é", "negative")


@pytest.mark.parametrize("how", ["transient", "later", "database"])
async def test_a_transient_error_is_transient_to_the_caller(channel: grpc.aio.Channel, how: str) -> None:
    with pytest.raises(Transient, match="memory at 127") as caught:
        await call(channel, how.encode())
    assert "hunter2" not in str(caught.value)


async def test_an_inner_error_shows_its_trace_and_nothing_else(
    channel: grpc.aio.Channel, exporter: InMemorySpanExporter
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel, b"bug")
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    details = caught.value.details() or ""
    trace_id = spans(exporter)[0].context.trace_id
    assert details == f"an error inside memory; the request is not the cause (trace {trace_id:032x})"


async def test_a_code_that_a_servicer_chose_itself_stays(channel: grpc.aio.Channel, metrics: Metrics) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="by itself") as caught:
        await call(channel, b"abort")
    assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE
    # The client may have the code before the server has counted the call; not so after another call.
    await call(channel, b"next")
    assert calls(metrics, "OUT_OF_RANGE") == 1


async def test_a_call_that_takes_too_long_is_transient(channel: grpc.aio.Channel, service: Service) -> None:
    with pytest.raises(Transient, match="Deadline"):
        await call(channel, b"wait", timeout=0.2)


async def test_a_missing_service_is_transient(channels: Channels) -> None:
    with pytest.raises(Transient, match="memory at 127"):
        await call(channels.to("127.0.0.1:1", "memory"), b"x")


async def test_only_safe_methods_are_repeated(channel: grpc.aio.Channel, service: Service) -> None:
    service.fail_times = 2
    assert await call(channel, b"again", method="Repeat") == b"again"
    assert service.asked == ["again"] * 3
    service.fail_times = 1
    with pytest.raises(Transient, match="not yet"):
        await call(channel, b"once")
    assert service.asked == ["again"] * 3 + ["once"]


async def test_repeating_ends(channel: grpc.aio.Channel, service: Service) -> None:
    service.fail_times = 100
    with pytest.raises(Transient, match="not yet"):
        await call(channel, b"again", method="Repeat")
    assert service.asked == ["again"] * 4


async def test_a_stream_is_served_under_the_same_rules(bare: grpc.aio.Channel, service: Service) -> None:
    count: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = bare.unary_stream(f"/{SERVICE}/Count")
    given = metadata(keys.callers("agent").token("memory"))
    assert [n async for n in count(b"3", timeout=5, metadata=given)] == [b"0", b"1", b"2"]
    assert service.caller == "agent"
    with pytest.raises(grpc.aio.AioRpcError, match="token: missing"):
        _ = [n async for n in count(b"3", timeout=5)]
    broken = count(b"2", timeout=5, metadata=given)
    assert [await broken.read(), await broken.read()] == [b"0", b"1"]
    with pytest.raises(grpc.aio.AioRpcError, match="a third") as caught:
        await broken.read()
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def spans(exporter: InMemorySpanExporter) -> list[ReadableSpan]:
    """The spans in the order of their start."""
    return sorted(exporter.get_finished_spans(), key=lambda span: span.start_time or 0)


async def test_a_call_is_a_client_and_a_server_span_of_one_trace(
    channel: grpc.aio.Channel, service: Service, exporter: InMemorySpanExporter
) -> None:
    with telemetry.span("work"):
        await call(channel, b"hello")
    work, client, server = spans(exporter)
    assert (client.kind, server.kind) == (SpanKind.CLIENT, SpanKind.SERVER)
    assert client.parent == work.context
    assert server.parent is not None
    assert client.context is not None
    assert (server.parent.trace_id, server.parent.span_id) == (client.context.trace_id, client.context.span_id)
    assert client.name == server.name == f"{SERVICE}/Echo"
    assert server.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": f"{SERVICE}/Echo",
        "rpc.response.status_code": "OK",
    }
    assert server.context is not None
    assert service.carrier["traceparent"].split("-")[2] == f"{server.context.span_id:016x}"


@pytest.mark.parametrize(("how", "fault"), [("not-found", False), ("transient", True), ("bug", True)])
async def test_only_faults_are_errors_of_the_server(
    channel: grpc.aio.Channel, exporter: InMemorySpanExporter, how: str, fault: bool
) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011
        await call(channel, how.encode())
    client, server = spans(exporter)
    assert client.status.status_code is StatusCode.ERROR
    assert (server.status.status_code is StatusCode.ERROR) == fault


def calls(metrics: Metrics, code: str) -> float | None:
    labels = {"method": f"{SERVICE}/Echo", "code": code}
    return metrics.registry.get_sample_value("claw_grpc_request_seconds_count", labels)


async def test_calls_are_measured_by_method_and_code(channel: grpc.aio.Channel, metrics: Metrics) -> None:
    await call(channel, b"hello")
    with pytest.raises(NotFound):
        await call(channel, b"not-found")

    assert (calls(metrics, "OK"), calls(metrics, "NOT_FOUND")) == (1, 1)


async def test_one_channel_per_target_is_reused(channels: Channels) -> None:
    one = channels.to("127.0.0.1:1", "memory")
    assert channels.to("127.0.0.1:1", "memory") is one
    assert channels.to("127.0.0.1:2", "memory") is not one


async def test_health_is_open_to_all_and_ends_with_the_drain(service: Service, metrics: Metrics) -> None:
    server = Server("memory", keys.callers("memory"), metrics, METHODS)
    service.add_to(server.grpc)
    port = await server.start(0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as bare:
        watch = health_pb2_grpc.HealthStub(bare).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        stopping = asyncio.create_task(server.stop())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        await stopping


async def test_calls_of_health_are_small_and_a_watch_ends(
    bare: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = health_pb2_grpc.HealthStub(bare)
    for length, code in ((190, grpc.StatusCode.NOT_FOUND), (200, grpc.StatusCode.RESOURCE_EXHAUSTED)):
        request = health_pb2.HealthCheckRequest(service="x" * length)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Check(request, timeout=5)
        assert refused.value.code() is code
    watch = stub.Watch(request)
    with pytest.raises(grpc.aio.AioRpcError, match="larger than 200 bytes"):
        await watch.read()
    monkeypatch.setattr(rpc, "WATCH_SECONDS", 0.1)
    watch = stub.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError, match="watch again"):
        await watch.read()


async def test_stopping_lets_calls_finish_and_takes_no_more(
    service: Service, metrics: Metrics, channels: Channels
) -> None:
    server = Server("memory", keys.callers("memory"), metrics, METHODS)
    service.add_to(server.grpc)
    channel = channels.to(f"127.0.0.1:{await server.start(0)}", "memory")
    under_way = asyncio.create_task(call(channel, b"wait", timeout=30))
    await service.entered.wait()
    stopping = asyncio.create_task(server.stop())
    until = time.monotonic() + 10
    refused = False
    while not refused and time.monotonic() < until:
        try:
            await call(channel, b"late", timeout=1)
        except Transient:
            refused = True
    assert refused
    assert not under_way.done()
    service.go.set()
    assert await under_way == b"wait"
    await stopping


async def test_a_taken_port_is_named(port: int, metrics: Metrics) -> None:
    server = Server("memory", keys.callers("memory"), metrics, METHODS)
    with pytest.raises(OSError, match=f"gRPC on 127.0.0.1:{port}"):
        await server.start(port)
    with pytest.raises(OSError, match="CLAW_GRPC_PORT: missing"):
        await server.start(None)


async def test_a_connection_that_breaks_is_transient_and_heals(channels: Channels, port: int, service: Service) -> None:
    async with FaultProxy("127.0.0.1", port) as proxy:
        channel = channels.to(f"127.0.0.1:{proxy.port}", "memory", safe=[f"{SERVICE}/Repeat"])
        assert await call(channel, b"before") == b"before"
        under_way = asyncio.create_task(call(channel, b"wait"))
        await service.entered.wait()
        proxy.reset()
        with pytest.raises(Transient):
            await under_way
        assert await call(channel, b"after", method="Repeat") == b"after"
        proxy.blackhole()
        with pytest.raises(Transient):
            await call(channel, b"lost", timeout=0.3)
        proxy.heal()
        assert await call(channel, b"healed", method="Repeat") == b"healed"


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("no token", "token: missing"),
        ("no deadline", "deadline: missing"),
        ("no message", "body: missing"),
        ("health", "body: missing"),
    ],
)
async def test_a_call_that_sends_no_message_is_not_held_open(
    bare: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch, what: str, reason: str
) -> None:
    monkeypatch.setattr(rpc, "READ_SECONDS", 0.2 if what in ("no message", "health") else 60)
    method = "/grpc.health.v1.Health/Check" if what == "health" else f"/{SERVICE}/Echo"
    given = None if what == "no token" else metadata(keys.callers("agent").token("memory"))
    silent: Any = bare.stream_unary(method)(metadata=given, timeout=None if what == "no deadline" else 30)
    async with asyncio.timeout(5):
        with pytest.raises(grpc.aio.AioRpcError, match=reason):
            await silent


async def test_one_service_cannot_take_all_of_another(
    monkeypatch: pytest.MonkeyPatch, metrics: Metrics, service: Service, channels: Channels
) -> None:
    monkeypatch.setattr(rpc, "MAX_CALLS", 3)
    monkeypatch.setattr(rpc, "MAX_HEALTH_CALLS", 2)
    server = Server("memory", keys.callers("memory"), metrics, METHODS)
    service.add_to(server.grpc)
    target = f"127.0.0.1:{await server.start(0)}"
    first = channels.to(target, "memory")
    held = [asyncio.create_task(call(first, b"wait", timeout=30)) for _ in range(4)]
    async with asyncio.timeout(5):
        while len(service.asked) < 3:
            await asyncio.sleep(0.01)
    # Channels with the same options share a connection.
    async with grpc.aio.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) as second:
        given = metadata(keys.callers("agent").token("memory", "t1"))
        with pytest.raises(grpc.aio.AioRpcError, match="agent: 3 calls are under way") as caught:
            await unary(second)(b"more", timeout=5, metadata=given)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        other = metadata(keys.callers("plugin").token("memory", "t1"))
        assert await unary(second, "OfTenant")(b"other", timeout=5, metadata=other) == b"other"
        # On its own connection the fourth waits.
        assert service.asked == [*["wait"] * 3, "other"]
        service.go.set()
        assert await asyncio.gather(*held) == [b"wait"] * 4
        assert await unary(second)(b"more", timeout=5, metadata=given) == b"more"
        watches = [health_pb2_grpc.HealthStub(second).Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
        await asyncio.gather(*(watch.read() for watch in watches))
        more = health_pb2_grpc.HealthStub(channels.to(target, "memory")).Watch(health_pb2.HealthCheckRequest())
        with pytest.raises(grpc.aio.AioRpcError, match="2 calls are under way"):
            await more.read()
    await server.stop()


@pytest.mark.parametrize(("body", "name", "value"), [(b"x" * 5_000_000, "a", "b"), (b"x", "large", "y" * 1_000_000)])
async def test_a_message_and_its_metadata_have_limits(
    bare: grpc.aio.Channel, service: Service, body: bytes, name: str, value: str
) -> None:
    given = (*metadata(keys.callers("agent").token("memory")), (name, value))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await unary(bare)(body, timeout=5, metadata=given)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert service.asked == []


async def test_text_that_postgresql_cannot_hold_is_refused_with_its_field() -> None:
    async def sent(text: str) -> AsyncIterator[bytes]:
        yield health_pb2.HealthCheckRequest(service=text).SerializeToString()

    read = rpc._reader(health_pb2.HealthCheckRequest.FromString)
    assert (await read(sent("ab"))).service == "ab"
    with pytest.raises(InvalidMessage, match="service: must not contain"):
        await read(sent("a\0b"))
