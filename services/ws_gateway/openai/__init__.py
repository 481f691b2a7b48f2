"""Agents in OpenAI's shapes: an agent is a model, and the model's id is the agent's.

``POST /v1/chat/completions``, ``POST /v1/responses``, ``GET /v1/models`` and ``/v1/models/{id}``, by
https://platform.openai.com/docs/api-reference. Where the standard leaves a choice, or cannot be followed:

- A request is stateless: it carries the whole conversation, and its run has a session of its own. The last message is
  the user's, or what tools gave back for it, and is put to the model verbatim; ``system`` and ``developer`` messages
  (``instructions``) are added to the agent's own system prompt.
- Images and audio, tools that are no functions, ``n`` above 1, ``stop``, log probabilities, and responses that refer to
  earlier ones are refused with a 400 that names the field. How the text is sampled and how long it may get is the
  agent's matter: ``temperature``, ``max_tokens`` and their like are ignored.
- Functions of the client (``tools``) are offered to the model beside the agent's own tools, whose names they may not
  have. The agent's own are used on the way and not shown. A call of the client's ends the run, and the client comes
  again with the conversation and the result. Where the model calls both kinds at once only the client's are returned,
  and the agent's own are not made: nothing could carry their results to the next run. Nor does that run know of what
  the agent's own tools gave back on the way to a client's call, so the model may call them again.
- ``tool_choice`` is of the client's tools: ``required``, or one by its name, means that the run ends with a call of
  one, or of that one; ``none``, that they are not offered; the agent's own are used in any case. What the model does
  against the choice, or against the schema of a ``strict`` function, it is asked for again.
- A format (``response_format``, ``text.format``) holds for its run, ``strict`` or not: an answer that does not fit is
  asked for again, and one that never fits is a 502. It stands in the place of the agent's own ``output_schema``, for
  the client knows what it can read; but ``json_object``, any object, and ``text`` leave that in force. A schema is of
  an object, as the standard has it, and takes what the agent's own may.
- An answer that has to fit a schema, whoever's, or to call a tool comes in one piece, once it does; nothing is shown
  before it. Calls always do.
- Of the agent's steps only text is shown. Not streamed, that is the run's reply. A stream also has what the model wrote
  before it called a tool, for that cannot be known in time: before the reply's text, separated by an empty line
  (completions), or as an output item of its own (responses).
- A stream takes nothing back: where text that was sent turns out not to be in the answer, it ends with an error.
- A client that goes cancels the run, unless it gave an ``Idempotency-Key``, by which it may come again for the answer.
- What the model did not report is left out of the usage, and is not zero.
"""
