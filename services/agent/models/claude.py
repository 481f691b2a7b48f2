"""Anthropic's models through pydantic-ai's direct model API."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx2
import msgspec
from pydantic_ai import ModelProfile
from pydantic_ai import messages as wire
from pydantic_ai.direct import model_request_stream
from pydantic_ai.exceptions import (
    AgentRunError,
    ModelAPIError,
    ModelConnectionError,
    ModelHTTPError,
    ModelQuotaExceededError,
    ModelRateLimitError,
    ModelRequestTimeout,
    ModelServerError,
    ModelUnavailableError,
)
from pydantic_ai.models import Model as LibraryModel
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.settings import ModelSettings
from pydantic_ai.tools import ToolDefinition
from pydantic_ai.usage import RequestUsage

from infra.errors import InvalidMessage, TooLarge
from infra.observe.redaction import redacted
from infra.outgoing.retry_after import retry_after
from services.agent.models import chat, refusals
from services.agent.models.completions import without_halves
from services.agent.models.contract import (
    AssistantTurn,
    Image,
    ModelAnswer,
    ModelEndpoint,
    ModelFailed,
    OnText,
    Prompt,
    Reasoning,
    ToolCall,
    ToolTurn,
    Turn,
    Usage,
    UserTurn,
)
from services.agent.models.pieces import MAX_CALLS
from services.agent.models.thoughts import without_thoughts
from services.agent.models.tool_schemas import tool_schema
from services.agent.models.wording import system_message, valid_arguments, wire_name

_TRANSIENT = (
    ModelRateLimitError,
    ModelUnavailableError,
    ModelServerError,
    ModelConnectionError,
    ModelRequestTimeout,
)
# Without this the library inserts a joiner into text that looks like a chat template's token. A person's text must
# go out verbatim.
_VERBATIM = ModelProfile(may_tokenize_special_tokens_in_content=False, supports_json_schema_output=True)


def claude(name: str, endpoint: ModelEndpoint, client: httpx2.AsyncClient) -> ProviderModel:
    """`name`: ``anthropic/<the provider's model name>``."""
    # Imported here and not at the top: it is a quarter of the import time of a process, and few agents use it.
    from anthropic import AsyncAnthropic
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.providers.anthropic import AnthropicProvider

    key = endpoint.api_key or "none"
    # The library adds /v1 itself.
    base = endpoint.base_url and endpoint.base_url.rstrip("/").removesuffix("/v1")
    # The library sends the key as a bearer token. Servers that follow the older documentation read x-api-key. Its own
    # retries are off, because each attempt is usage and must be recorded.
    library = AsyncAnthropic(
        base_url=base, api_key=key, http_client=client, max_retries=0, default_headers={"x-api-key": key}
    )
    own_name = name.partition("/")[2]
    model = AnthropicModel(own_name, provider=AnthropicProvider(anthropic_client=library), profile=_VERBATIM)
    return ProviderModel(name, model, f"{name} {library.base_url.host}")


class ProviderModel:
    """One model of a provider."""

    def __init__(self, name: str, model: LibraryModel[Any], sender: str) -> None:
        """`sender`: as `Extra.model`."""
        self._name = name
        self._model = model
        self._sender = sender

    async def answer(self, prompt: Prompt, on_text: OnText) -> ModelAnswer:
        """Sends one streaming request, or a second one if the limit of the answer is too large. Raises ModelFailed."""
        try:
            return await self._answer(prompt, on_text)
        except ModelFailed as error:
            limit = prompt.max_output_tokens
            most = None if error.transient or limit is None else refusals.largest(error.reason, limit)
            if most is None:
                raise
        return await self._answer(msgspec.structs.replace(prompt, max_output_tokens=most), on_text)

    async def _answer(self, prompt: Prompt, on_text: OnText) -> ModelAnswer:
        names = {wire_name(tool.name): tool.name for tool in prompt.tools}
        parameters = ModelRequestParameters(
            output_mode="text",
            function_tools=[
                # Set for each tool: without it the library makes schemas strict that were not meant to be.
                ToolDefinition(
                    name=wire_name(tool.name),
                    parameters_json_schema=tool_schema(tool.schema),
                    description=tool.description,
                    strict=tool.strict,
                )
                for tool in prompt.tools
            ],
        )
        settings = ModelSettings()
        if prompt.max_output_tokens is not None:
            settings["max_tokens"] = prompt.max_output_tokens
        sampling = prompt.sampling
        # Of some models these are fixed; the library would warn. Others refuse both at once.
        if self._model.profile.get("anthropic_disallows_sampling_settings"):
            pass
        elif sampling.temperature is not None:
            settings["temperature"] = min(sampling.temperature, 1.0)
        elif sampling.top_p is not None:
            settings["top_p"] = sampling.top_p
        # Anthropic refuses a text of spaces alone. `ModelCalls` ends the answer there.
        if stops := [stop for stop in sampling.stop if stop.strip()]:
            settings["stop_sequences"] = stops
        if prompt.tools and prompt.must_call:
            settings["tool_choice"] = "required"
        if not prompt.parallel:
            settings["parallel_tool_calls"] = False
        with _failures(self._name):
            async with (
                asyncio.timeout(chat.FIRST_TOKEN_SECONDS) as waiting,
                model_request_stream(
                    self._model,
                    _messages(prompt, self._sender),
                    model_settings=settings,
                    model_request_parameters=parameters,
                ) as stream,
            ):
                held = ""
                async for event in stream:
                    waiting.reschedule(None)
                    if isinstance(event, wire.PartStartEvent) and event.index > MAX_CALLS:
                        raise TooLarge(f"the answer has more than {MAX_CALLS} parts")
                    text = held + _text(event)
                    # The first half of a character, whose second half comes with the next text.
                    held = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
                    if text := without_halves(text.removesuffix(held)):
                        await on_text(text)
                if held:
                    await on_text(without_halves(held))
                response = stream.get()
        details = response.provider_details or {}
        finish = response.finish_reason or chat.finish_reason(str(details.get("finish_reason")))
        usage = _usage(response.usage, has_content=bool(response.parts))
        if finish == "interrupted":
            raise ModelFailed(f"{self._name}: the server failed during the answer", transient=True, usage=usage)
        calls = tuple(
            ToolCall(part.tool_call_id, names.get(part.tool_name, part.tool_name), without_halves(_arguments(part)))
            for part in response.parts
            if isinstance(part, wire.ToolCallPart)
        )
        text = without_halves("".join(part.content for part in response.parts if isinstance(part, wire.TextPart)))
        if finish == "content_filter" and not text.strip() and not calls:
            # ``stop_details.explanation`` of https://platform.claude.com/docs/en/api/messages
            refusal = details.get("refusal")
            if not isinstance(refusal, str) or not refusal.strip():
                reason = f"{self._name}: the provider's content filter withheld the answer"
                raise ModelFailed(reason, transient=False, usage=usage)
            text, finish = without_halves(refusal), "refusal"
            await on_text(text)
        thoughts = tuple(
            {"thinking": without_halves(part.content), "signature": without_halves(part.signature), "id": part.id}
            for part in response.parts
            if isinstance(part, wire.ThinkingPart) and part.signature
        )
        return ModelAnswer(
            text=without_thoughts(text),
            calls=calls,
            usage=usage,
            model=response.model_name or self._name,
            finish_reason=finish,
            reasoning=Reasoning("thinking", "", self._sender, thoughts) if calls and thoughts else None,
        )


def _image(image: Image) -> wire.BinaryContent | wire.ImageUrl:
    if image.url.startswith("data:"):
        return wire.BinaryContent.from_data_uri(image.url)
    return wire.ImageUrl(image.url)


def _messages(prompt: Prompt, sender: str) -> list[wire.ModelMessage]:
    messages: list[wire.ModelMessage] = []
    if text := system_message(prompt):
        messages.append(wire.ModelRequest(parts=[wire.SystemPromptPart(text)]))
    ids: dict[str, str] = {}
    taken: set[str] = set()
    after_result = False
    for turn in prompt.turns:
        for call in turn.calls if isinstance(turn, AssistantTurn) else ():
            # Some servers repeat an id in later answers. Anthropic refuses it.
            id_ = wire_name(call.id)
            while id_ in taken:
                id_ += f"_{len(taken)}"
            taken.add(id_)
            ids[call.id] = id_
        message = _message(turn, ids, sender)
        if isinstance(turn, ToolTurn) and after_result:
            # Anthropic takes the results of an answer's calls in one message.
            messages[-1].parts = [*messages[-1].parts, *message.parts]
        else:
            messages.append(message)
        after_result = isinstance(turn, ToolTurn)
    return messages


def _message(turn: Turn, ids: Mapping[str, str], sender: str) -> wire.ModelMessage:
    """`ids`: the id in the request of the latest call with an id. `sender`: whose thoughts are sent back."""
    match turn:
        case UserTurn(text, images) if images:
            words = [text] if text else []
            return wire.ModelRequest(parts=[wire.UserPromptPart([*words, *map(_image, images)])])
        case UserTurn(text):
            return wire.ModelRequest(parts=[wire.UserPromptPart(text)])
        case AssistantTurn(text, calls, reasoning):
            parts: list[wire.ModelResponsePart] = []
            if reasoning and reasoning.model == sender:
                parts += [
                    wire.ThinkingPart(
                        str(one.get("thinking") or ""),
                        id=one.get("id"),
                        signature=one.get("signature"),
                        provider_name="anthropic",
                    )
                    for one in reasoning.details
                ]
            parts += [wire.TextPart(text)] if text else []
            parts += [
                wire.ToolCallPart(wire_name(call.name), valid_arguments(call.arguments), tool_call_id=ids[call.id])
                for call in calls
            ]
            return wire.ModelResponse(parts=parts)
        case ToolTurn(call, content):
            id_ = ids.get(call.id, wire_name(call.id))
            return wire.ModelRequest(parts=[wire.ToolReturnPart(wire_name(call.name), content, tool_call_id=id_)])


def _text(event: object) -> str:
    match event:
        case wire.PartStartEvent(part=wire.TextPart(content=text)):
            return text
        case wire.PartDeltaEvent(delta=wire.TextPartDelta(content_delta=text)):
            return text
    return ""


def _arguments(call: wire.ToolCallPart) -> str:
    # As the model wrote them: the library would wrap invalid JSON into valid JSON. Of a tool without parameters, Claude
    # streams no arguments.
    return (call.args if isinstance(call.args, str) else call.args_as_json_str()) or "{}"


def _usage(usage: RequestUsage, *, has_content: bool) -> Usage:
    # The library takes counts that it cannot read for zero. The prompt is never empty, and content is output.
    if usage.unmeasured_requests or not usage.input_tokens or (has_content and not usage.output_tokens):
        return Usage()
    # A field that the provider did not report is not set on the object. Reading it gives the class's default, zero.
    reported = vars(usage)
    return Usage(
        input_tokens=usage.input_tokens,
        cached_tokens=reported.get("cache_read_tokens"),
        cache_write_tokens=reported.get("cache_write_tokens"),
        output_tokens=usage.output_tokens,
        reasoning_tokens=reported.get("output_reasoning_tokens", usage.details.get("reasoning_tokens")),
    )


@contextmanager
def _failures(name: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        reason = f"{name}: no answer began within {chat.FIRST_TOKEN_SECONDS:g} seconds"
        raise ModelFailed(reason, transient=True) from error
    except (AgentRunError, InvalidMessage, TooLarge) as error:
        raise _failure(name, error) from error
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        # Any value may stand in any place of an answer, and the library expects Anthropic's.
        raise ModelFailed(f"{name}: the answer is malformed", transient=True) from error


def _failure(name: str, error: Exception) -> ModelFailed:
    cause: BaseException | None = error
    while cause:
        # The guard of outgoing calls refused the address, or the answer is too large. One library passes these errors
        # on, another reports them as a failed connection.
        if isinstance(cause, (InvalidMessage, TooLarge)):
            return ModelFailed(f"{name}: {cause}", transient=False)
        cause = cause.__cause__
    if isinstance(error, ModelHTTPError):
        transient = error.status_code >= 500 or error.status_code in chat.TRANSIENT_STATUS
        transient = transient and not isinstance(error, ModelQuotaExceededError)
        reason = f"{name}: HTTP {error.status_code}{_detail(error)}"
        return ModelFailed(reason, transient=transient, after=retry_after(error.headers or {}))
    if isinstance(error, ModelAPIError):
        if "without a `finish_reason`" in error.message:
            return ModelFailed(f"{name}: the answer was cut off", transient=True)
        # For an error inside a stream only its kind is known.
        return ModelFailed(f"{name}: {type(error).__name__}", transient=isinstance(error, _TRANSIENT))
    return ModelFailed(f"{name}: the answer is malformed", transient=True)


def _detail(error: ModelHTTPError) -> str:
    """The provider's message, except if it is about the key: some providers repeat parts of it."""
    if error.status_code in (401, 403):
        return " (is the provider's api_key right?)"
    body = error.body
    inner = body.get("error", body) if isinstance(body, dict) else None
    message = inner.get("message") if isinstance(inner, dict) else None
    return f": {redacted(message)[:300]}" if isinstance(message, str) else ""
