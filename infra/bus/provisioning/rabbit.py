"""Exchanges, queues and bindings: the differences between catalog and broker, and the changes that remove them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx

from infra.bus.provisioning.drift import Drift, ProvisioningError, extra, fixable, refused
from protos.topology import Queue

# A message that crashes its worker is delivered again, and no attempt is counted; this limit ends the loop. It is not
# a retry counter: a message that a worker has only prefetched before it left counts as well.
_DELIVERY_LIMIT = 20
# From RabbitMQ 4 on, a queue without a limit has 20. In a queue of dead letters, a message above it would be lost.
_NO_DELIVERY_LIMIT = 2**31 - 1


def queue_arguments(queue: Queue) -> dict[str, dict[str, Any]]:
    """The queues that belong to `queue`, with their arguments: itself, a wait queue per delay, the dead letters.

    Retries and dead letters go through the default exchange, which needs no binding that could be missing. A
    message waits in a queue whose time to live is the delay, and goes back by itself. *at-least-once* with
    *reject-publish* keeps it in its queue until the next queue has confirmed it.
    """
    hand_over = {
        "x-queue-type": "quorum",
        "x-dead-letter-exchange": "",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
        "x-max-length": queue.max_length,
    }
    own = {
        **hand_over,
        "x-dead-letter-routing-key": queue.dead_letter_queue,
        "x-delivery-limit": _DELIVERY_LIMIT,
    }
    if queue.expires:
        own["x-message-ttl"] = int(queue.expires.total_seconds() * 1000)
    waits = {
        queue.retry_queue(delay): {
            **hand_over,
            "x-dead-letter-routing-key": queue.name,
            "x-message-ttl": int(delay.total_seconds() * 1000),
        }
        for delay in queue.retries
    }
    dead = {"x-queue-type": "quorum", "x-delivery-limit": _NO_DELIVERY_LIMIT}
    return {queue.name: own, **waits, queue.dead_letter_queue: dead}


class _Binding(NamedTuple):
    exchange: str
    queue: str
    routing_key: str

    def __str__(self) -> str:
        return f"binding {self.exchange}:{self.routing_key} → {self.queue}"


def _binding_of(queue: Queue) -> _Binding:
    return _Binding(queue.exchange.name, queue.name, queue.routing_key)


class Queues:
    """Exchanges, queues and bindings of one virtual host."""

    def __init__(self, management: httpx.AsyncClient, vhost: str) -> None:
        self._management = management
        self._vhost = vhost

    async def drift(self, queues: Sequence[Queue]) -> list[Drift]:
        exchanges = {row["name"]: row for row in await self._list("exchanges")}
        found = {row["name"]: row for row in await self._list("queues")}
        bindings = {
            _Binding(row["source"], row["destination"], row["routing_key"])
            for row in await self._list("bindings")
            if row["source"] and row["destination_type"] == "queue"
        }
        wanted_exchanges = {queue.exchange.name: queue.exchange for queue in queues}
        wanted = {name: arguments for queue in queues for name, arguments in queue_arguments(queue).items()}
        wanted_bindings = {_binding_of(queue) for queue in queues}

        drifts = []
        for name, exchange in wanted_exchanges.items():
            body = _exchange_body(exchange.kind)
            row = exchanges.get(name)
            drifts += _compare(f"exchange {name}", body, row and {key: row[key] for key in body})
        for name, arguments in wanted.items():
            drifts += _compare(f"queue {name}", arguments, found[name]["arguments"] if name in found else None)
        for binding in sorted(wanted_bindings - bindings):
            drifts.append(fixable(str(binding), "binding", wanted="bound", found="-", reason="is bound"))
        own = {name for name in exchanges if name and not name.startswith("amq.")}
        drifts += [extra(f"exchange {name}", "exchange") for name in sorted(own - wanted_exchanges.keys())]
        drifts += [extra(f"queue {name}", "queue") for name in sorted(found.keys() - wanted.keys())]
        drifts += [extra(str(binding), "binding") for binding in sorted(bindings - wanted_bindings)]
        return drifts

    async def mend(self, queues: Sequence[Queue], subjects: set[str]) -> None:
        for queue in queues:
            exchange = queue.exchange
            if f"exchange {exchange.name}" in subjects:
                await self._send("PUT", "exchanges", exchange.name, body=_exchange_body(exchange.kind))
            # Dead letters and wait queues first: when the queue takes its first message, they are there.
            for name, arguments in reversed(queue_arguments(queue).items()):
                if f"queue {name}" in subjects:
                    await self._send("PUT", "queues", name, body={"durable": True, "arguments": arguments})
            if str(_binding_of(queue)) in subjects:
                body = {"routing_key": queue.routing_key}
                await self._send("POST", "bindings", "e", exchange.name, "q", queue.name, body=body)

    async def _list(self, kind: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = (await self._send("GET", kind)).json()
        return rows

    async def _send(self, method: str, kind: str, *names: str, body: dict[str, Any] | None = None) -> httpx.Response:
        path = "/".join(quote(name, safe="") for name in (kind, self._vhost, *names))
        response = await self._management.request(method, path, json=body)
        if response.is_error:
            raise ProvisioningError(f"RabbitMQ's management: {method} {path}: {response.status_code} {response.text}")
        return response


def _exchange_body(kind: str) -> dict[str, Any]:
    return {"type": kind, "durable": True}


def _compare(subject: str, wanted: dict[str, Any], found: dict[str, Any] | None) -> list[Drift]:
    kind = subject.partition(" ")[0]
    if found is None:
        return [fixable(subject, kind, wanted="there", found="-", reason="is created")]
    reason = f"RabbitMQ cannot change it; empty the {kind}, delete it and provision again"
    return [
        refused(subject, name, wanted=wanted.get(name, "-"), found=found.get(name, "-"), reason=reason)
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
