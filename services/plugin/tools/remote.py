"""A tenant's own tool over HTTP, signed by Standard Webhooks (https://www.standardwebhooks.com).

Sends POST ``{"tool", "arguments", "config"}``. ``webhook-id`` is the call's idempotency key, the same for each repeat.
A status 2xx with JSON is the result. 429 and 503 mean: call again later. Every other status is a failure of the tool.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import msgspec

from infra.clock import utcnow
from infra.errors import EffectFailed, RetryLater, Unanswered
from infra.outgoing.client import Outgoing
from infra.outgoing.retry_after import retry_after
from infra.outgoing.webhooks import sign
from services.plugin.domain import ToolRequest

# With files, which are taken out of the result.
MAX_ANSWER_BYTES = 4 * 1024 * 1024
DEFAULT_RETRY = timedelta(seconds=1)


async def call(
    outgoing: Outgoing, url: str, headers: Mapping[str, str], secret: str, config: Mapping[str, Any], call: ToolRequest
) -> Any:
    """Returns the JSON that the tool answers, None for an empty answer.

    Raises EffectFailed, RetryLater, and the errors of `Outgoing.request`.
    """
    body = msgspec.json.encode({"tool": call.tool, "arguments": call.arguments, "config": config})
    signature = sign(secret, call.key, utcnow(), body)
    answer = await outgoing.request(
        "POST",
        url,
        headers={**headers, "content-type": "application/json", "accept": "application/json", **signature},
        content=body,
        timeout=call.seconds,
        max_bytes=MAX_ANSWER_BYTES,
    )
    if answer.status in (429, 503):
        raise RetryLater(retry_after(answer.headers) or DEFAULT_RETRY, f"HTTP {answer.status}")
    if answer.status in (502, 504):
        # These statuses come from a gateway. The tool behind it may have done its work.
        raise Unanswered(f"HTTP {answer.status}")
    if not 200 <= answer.status < 300:
        text = answer.body[:500].decode(errors="replace").strip()
        raise EffectFailed(f"HTTP {answer.status}: {text}" if text else f"HTTP {answer.status}")
    if not answer.body:
        return None
    try:
        return msgspec.json.decode(answer.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise EffectFailed("the answer is not JSON") from None
