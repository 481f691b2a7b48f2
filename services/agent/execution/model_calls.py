"""Model calls of a run: each is a step, with credit reserved before it and its text shown while it is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta

import msgspec
from opentelemetry.trace import Span, SpanKind

from infra.observe import telemetry
from infra.stores.cache import Cache
from infra.stores.objects import Objects
from infra.web import data_urls
from services.agent.execution import images
from services.agent.execution.context import RunContext
from services.agent.execution.credit import RunCredit
from services.agent.execution.deltas import Deltas
from services.agent.execution.group_write import MessagesArrived
from services.agent.execution.outcome import Ended
from services.agent.execution.steps import StepFailed, Steps, StepSpec
from services.agent.execution.usage import MeteredCall
from services.agent.models.contract import Model, ModelAnswer, ModelFailed, Prompt, Usage
from services.agent.models.stops import Stops, before
from services.agent.runs.domain import messages_at
from services.agent.runs.notices import FAILED

ATTEMPTS = 5
# Attempts and longest pause of a model that has a fallback.
ATTEMPTS_BEFORE_FALLBACK = 2
PAUSE_BEFORE_FALLBACK = timedelta(seconds=2)
# Rough average over texts and tokenizers.
BYTES_PER_TOKEN = 4

_IMAGE = "x" * (images.IMAGE_TOKENS * BYTES_PER_TOKEN)

_PROVIDERS = {"google": "gcp.gemini"}


@dataclass(frozen=True)
class ModelCalls:
    """Asks the agent's models for one run."""

    context: RunContext
    steps: Steps
    credit: RunCredit
    models: Sequence[tuple[str, Model]]
    """By name. Each is asked if the one before gives no answer."""
    cache: Cache
    objects: Objects | None = None
    """The store of images; None: images are not shown to models."""

    async def ask(self, prompt: Prompt, digest: str, expected_messages: int | None = None) -> ModelAnswer:
        """The answer of the first model that gives one. Raises Ended if none does.

        Raises MessagesArrived instead of a call if the run has other than the expected messages (None: any).
        """
        *others, (last, model) = self.models
        for name, other in others:
            # If there is a fallback, the run does not wait long for this model.
            with suppress(StepFailed):
                spec = StepSpec("model", name, digest, ATTEMPTS_BEFORE_FALLBACK, max_pause=PAUSE_BEFORE_FALLBACK)
                return await self._ask_one(name, other, prompt, spec, expected_messages)
        spec = StepSpec("model", last, digest, ATTEMPTS)
        try:
            return await self._ask_one(last, model, prompt, spec, expected_messages)
        except StepFailed as error:
            raise Ended("failed", str(error), FAILED) from error

    async def _ask_one(
        self, name: str, model: Model, prompt: Prompt, spec: StepSpec, expected_messages: int | None
    ) -> ModelAnswer:
        context = self.context
        if expected_messages is not None and messages_at(context.state, context.last_step + 1) > expected_messages:
            # The journal has messages that came between a model that failed and its fallback.
            raise MessagesArrived
        hold = None if self.steps.next_has_ended() else await self.credit.reserve(name, prompt)
        family, _, own_name = name.partition("/")
        attributes: dict[str, telemetry.Value] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": _PROVIDERS.get(family, family),
            "gen_ai.request.model": own_name,
            "gen_ai.conversation.id": context.session_key,
        }

        with telemetry.span(f"chat {own_name}", SpanKind.CLIENT, attributes=attributes) as span:
            written_bytes = 0
            reported: Usage | None = None

            async def call(_: str, attempt: int) -> tuple[ModelAnswer, MeteredCall]:
                deltas = Deltas(self.cache, context.run_id, context.last_step, attempt)
                progress = context.progress
                if progress:
                    progress.text = ""
                stops = Stops(prompt.sampling.stop)

                async def on_text(text: str) -> None:
                    nonlocal written_bytes
                    # An image has the tokens of an image, and not those of its base64.
                    written_bytes += len(data_urls.replaced(text, lambda *_: _IMAGE).encode())
                    text = stops.feed(text)
                    # Text that may still be refused is not shown: a client cannot take it back.
                    if text and prompt.output_schema is None and not prompt.must_call:
                        deltas(text)
                        if progress:
                            progress.write(text)

                async def asked(shown: Prompt) -> ModelAnswer:
                    nonlocal reported
                    try:
                        return await model.answer(shown, on_text)
                    except ModelFailed as error:
                        reported = error.usage
                        raise

                shown = await images.loaded(prompt, self.objects)
                try:
                    answer = await asked(shown)
                except ModelFailed as error:
                    if error.usage or error.transient or not images.count(shown):
                        raise
                    # Maybe this model takes no images. It then tells the person that it has not seen them.
                    answer = await asked(images.without(shown, notice=True))
                if (text := before(answer.text, prompt.sampling.stop)) != answer.text:
                    answer = msgspec.structs.replace(answer, text=text, calls=(), finish_reason="stop")
                _set_usage(span, answer)
                assert hold
                return answer, MeteredCall(name, answer.usage, hold.id, hold.nanos)

            def lost(in_other_process: bool) -> MeteredCall | None:
                """Providers charge an answer that they have begun. A call of a dead process may have begun one."""
                if not (written_bytes or reported or in_other_process):
                    return None
                return lost_usage(name, prompt, written_bytes, reported)

            try:
                return await self.steps.make(
                    replace(spec, lost=lost), call, ModelAnswer, expected_messages=expected_messages
                )
            except (StepFailed, Ended, MessagesArrived):
                await self.credit.release(hold)
                raise


def lost_usage(name: str, prompt: Prompt, written_bytes: int, reported: Usage | None = None) -> MeteredCall:
    """The usage of a call without a result: as the provider has reported it, or an estimate. Of its answer,
    `written_bytes` have arrived."""
    if reported:
        return MeteredCall(name, reported, None)
    text = len(msgspec.json.encode(images.without(prompt, notice=False)))
    usage = Usage(
        input_tokens=_tokens(text) + images.count(prompt) * images.IMAGE_TOKENS, output_tokens=_tokens(written_bytes)
    )
    return MeteredCall(name, usage, None, estimated=True)


def _tokens(size: int) -> int:
    """Estimate for a text of `size` bytes whose tokens were not counted."""
    return math.ceil(size / BYTES_PER_TOKEN)


def _set_usage(span: Span, answer: ModelAnswer) -> None:
    span.set_attribute("gen_ai.response.model", answer.model)
    span.set_attribute("gen_ai.response.finish_reasons", [answer.finish_reason])
    usage = {
        "gen_ai.usage.input_tokens": answer.usage.input_tokens,
        "gen_ai.usage.cache_read.input_tokens": answer.usage.cached_tokens,
        "gen_ai.usage.output_tokens": answer.usage.output_tokens,
        "gen_ai.usage.reasoning.output_tokens": answer.usage.reasoning_tokens,
    }
    span.set_attributes({name: count for name, count in usage.items() if count is not None})
