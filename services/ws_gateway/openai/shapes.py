"""The answers in OpenAI's shapes. Pure, except for the clock."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol
from uuid import UUID

import msgspec

from services.ws_gateway.openai.conversation import FunctionCall
from services.ws_gateway.openai.domain import Piece
from services.ws_gateway.openai.errors import CompletionError


class Usage(msgspec.Struct, frozen=True):
    """The tokens of a run's model calls. None means not reported."""

    input_tokens: int | None
    cached_tokens: int | None
    """Part of the input tokens."""
    output_tokens: int | None


UNREPORTED = Usage(None, None, None)

Finish = Literal["stop", "length", "content_filter"]
"""length: the text is cut off at the model's token limit. content_filter: it is cut off by the provider."""


class Reply(msgspec.Struct, frozen=True):
    """The reply of a run."""

    text: str
    """If there are calls, the text before them; may be empty then."""
    calls: tuple[FunctionCall, ...] = msgspec.field(default=(), name="tool_calls")
    """Calls of the client's functions."""
    finish_reason: Finish = "stop"


# The status of a response.
_STATUS: Mapping[Finish, str] = {"stop": "completed", "length": "incomplete", "content_filter": "incomplete"}


class Shape(Protocol):
    """An answer, whole or as parts of a stream. Each part consists of server-sent events."""

    wants_usage: bool
    """True if a stream ends with the usage."""

    def whole(self, reply: Reply, usage: Usage) -> dict[str, Any]: ...
    def begin(self) -> bytes: ...
    def text(self, piece: Piece) -> bytes: ...
    def calls(self, calls: Sequence[FunctionCall]) -> bytes: ...
    def end(self, usage: Usage, finish: Finish = "stop") -> bytes: ...
    def failed(self, failure: CompletionError) -> bytes: ...


class Chat:
    """https://platform.openai.com/docs/api-reference/chat"""

    def __init__(self, run_id: UUID, model: str, *, include_usage: bool, old: bool = False) -> None:
        """`old`: a call is told as before there were tools."""
        self._base = {"id": f"chatcmpl-{run_id}", "created": int(time.time()), "model": model}
        self.wants_usage = include_usage
        self._step: int | None = None
        self._finish = "stop"
        self._old = old

    def whole(self, reply: Reply, usage: Usage) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
        if reply.calls:
            self._finish = "function_call" if self._old else "tool_calls"
            message |= {"content": reply.text or None, **self._called(reply.calls)}
        finish = self._finish if reply.finish_reason == "stop" else reply.finish_reason
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        answer = {**self._base, "object": "chat.completion", "choices": [choice]}
        return answer | ({"usage": found} if (found := _chat_usage(usage)) else {})

    def begin(self) -> bytes:
        return self._chunk({"role": "assistant", "content": ""})

    def text(self, piece: Piece) -> bytes:
        apart = "\n\n" if self._step not in (None, piece.step) else ""
        self._step = piece.step
        return self._chunk({"content": apart + piece.text})

    def calls(self, calls: Sequence[FunctionCall]) -> bytes:
        """Sends each call in one piece: the run has ended with the calls, so they are final."""
        self._finish = "function_call" if self._old else "tool_calls"
        if self._old:
            return self._chunk(self._called(calls))
        return b"".join(self._chunk({"tool_calls": [{"index": n} | _tool_call(call)]}) for n, call in enumerate(calls))

    def _called(self, calls: Sequence[FunctionCall]) -> dict[str, Any]:
        """The field of a message that has the calls."""
        told = list(map(_tool_call, calls))
        return {"function_call": told[0]["function"]} if self._old else {"tool_calls": told}

    def end(self, usage: Usage, finish: Finish = "stop") -> bytes:
        found = _chat_usage(usage) if self.wants_usage else None
        last = _data(self._with_usage([], found)) if found else b""
        return self._chunk({}, self._finish if finish == "stop" else finish) + last + b"data: [DONE]\n\n"

    def failed(self, failure: CompletionError) -> bytes:
        return _data({"error": failure.error})

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> bytes:
        choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
        return _data(self._with_usage(choices, None))

    def _with_usage(self, choices: list[Any], usage: dict[str, Any] | None) -> dict[str, Any]:
        chunk = {**self._base, "object": "chat.completion.chunk", "choices": choices}
        return chunk | ({"usage": usage} if self.wants_usage else {})


class Responses:
    """https://platform.openai.com/docs/api-reference/responses. The text of each step is an output item."""

    wants_usage = True

    def __init__(self, run_id: UUID, model: str, given: Mapping[str, Any]) -> None:
        """`given` has the fields of the request that the answer repeats."""
        self._run_id = run_id
        self._base = {
            "id": f"resp_{run_id}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "incomplete_details": None,
            "previous_response_id": None,
            "store": False,
            **given,
        }
        self._sequence = 0
        self._done: list[dict[str, Any]] = []
        self._step = 0  # the step of the open item; 0 if no item is open
        self._text = ""

    def whole(self, reply: Reply, usage: Usage) -> dict[str, Any]:
        status = _STATUS[reply.finish_reason]
        said = [self._item(status, reply.text)] if reply.text or not reply.calls else []
        called = [self._call(n, call) for n, call in enumerate(reply.calls)]
        return self._ended(reply.finish_reason, [*said, *called], usage)

    def begin(self) -> bytes:
        names = ("response.created", "response.in_progress")
        return b"".join(self._event(name, response=self._response("in_progress", [])) for name in names)

    def text(self, piece: Piece) -> bytes:
        before = b""
        if piece.step != self._step:
            before = self._close()
            self._step, self._text = piece.step, ""
            before += self._item_event("added", self._item("in_progress"))
            before += self._part_event("content_part.added", part=_part(""))
        self._text += piece.text
        return before + self._part_event("output_text.delta", delta=piece.text, logprobs=[])

    def calls(self, calls: Sequence[FunctionCall]) -> bytes:
        told = self._close()
        for n, call in enumerate(calls):
            item = self._call(n, call)
            place = {"item_id": item["id"], "output_index": len(self._done)}
            told += self._item_event("added", item | {"status": "in_progress", "arguments": ""})
            told += self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
            told += self._event(
                "response.function_call_arguments.done", **place, name=call.name, arguments=call.arguments
            )
            told += self._item_event("done", item)
            self._done.append(item)
        return told

    def end(self, usage: Usage, finish: Finish = "stop") -> bytes:
        status = _STATUS[finish]
        return self._close(status) + self._event(f"response.{status}", response=self._ended(finish, self._done, usage))

    def failed(self, failure: CompletionError) -> bytes:
        # The standard has few codes, and a client may not know any other.
        code = "rate_limit_exceeded" if failure.status == 429 else "server_error"
        items = [*self._done, *([self._item("incomplete", self._text)] if self._step else [])]
        return self._event(
            "response.failed", response=self._response("failed", items, error=failure.error | {"code": code})
        )

    def _close(self, status: str = "completed") -> bytes:
        """Ends the open item."""
        if not self._step:
            return b""
        item = self._item(status, self._text)
        ended = (
            self._part_event("output_text.done", text=self._text, logprobs=[])
            + self._part_event("content_part.done", part=_part(self._text))
            + self._item_event("done", item)
        )
        self._done.append(item)
        self._step = 0
        return ended

    def _ended(self, finish: Finish, output: list[Any], usage: Usage) -> dict[str, Any]:
        response = self._response(_STATUS[finish], output) | {"usage": _response_usage(usage)}
        reason = "max_output_tokens" if finish == "length" else finish
        return response if finish == "stop" else response | {"incomplete_details": {"reason": reason}}

    def _response(self, status: str, output: list[Any], *, error: dict[str, Any] | None = None) -> dict[str, Any]:
        return {**self._base, "status": status, "output": output, "usage": None, "error": error}

    def _item(self, status: str, text: str | None = None) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {"id": self._item_id(), "type": "message", "role": "assistant", "status": status, "content": content}

    def _call(self, n: int, call: FunctionCall) -> dict[str, Any]:
        return {
            "id": f"fc_{self._run_id}_{n}",
            "type": "function_call",
            "status": "completed",
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
        }

    def _item_id(self) -> str:
        return f"msg_{self._run_id}_{self._step}"

    def _item_event(self, name: str, item: dict[str, Any]) -> bytes:
        return self._event(f"response.output_item.{name}", output_index=len(self._done), item=item)

    def _part_event(self, name: str, **fields: Any) -> bytes:
        place = {"item_id": self._item_id(), "output_index": len(self._done), "content_index": 0}
        return self._event(f"response.{name}", **place, **fields)

    def _event(self, name: str, /, **fields: Any) -> bytes:
        data = _data({"type": name, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        return b"event: %b\n%b" % (name.encode(), data)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _tool_call(call: FunctionCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _data(data: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(data)


def _chat_usage(usage: Usage) -> dict[str, Any] | None:
    """The usage of a chat completion; None if the model has not reported it."""
    found, cached = _tokens(usage, "prompt_tokens", "completion_tokens"), usage.cached_tokens
    return found if found is None or cached is None else found | {"prompt_tokens_details": {"cached_tokens": cached}}


def _response_usage(usage: Usage) -> dict[str, Any] | None:
    """The usage of a response; None if the model has not reported it.

    Clients read all parts without asking whether they are there. Runs count neither tokens of thoughts nor writes of a
    cache.
    """
    found = _tokens(usage, "input_tokens", "output_tokens")
    return found and found | {
        "input_tokens_details": {"cached_tokens": usage.cached_tokens or 0, "cache_write_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }


def _tokens(usage: Usage, read: str, written: str) -> dict[str, Any] | None:
    if usage.input_tokens is None or usage.output_tokens is None:
        return None
    total = usage.input_tokens + usage.output_tokens
    return {read: usage.input_tokens, written: usage.output_tokens, "total_tokens": total}
