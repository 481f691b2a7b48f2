"""Agents in OpenAI's shapes: an agent is a model, and the id of the model is the id of the agent.

``POST /v1/chat/completions``, ``POST /v1/responses``, ``GET /v1/models`` and ``/v1/models/{id}``, by
https://platform.openai.com/docs/api-reference. These rules fill gaps of the standard, or deviate from it:

- A request is stateless: it carries the whole conversation, and its run has its own session. The last message is from
  the user, or has the results of tools for the user's message. It goes to the model verbatim. ``system`` and
  ``developer`` messages (``instructions``) are added to the agent's own system prompt; if there are no others, the last
  of them is answered.
- A user's images are addresses, or data URLs of at most 5 MB each and 20 MB in a request. In the place of an image or
  a file in a function's result, the model reads that it was left out.
- A reference to an item of an earlier answer (``item_reference``) is the reply or the call of its run, as long as the
  run is kept. A request refers to 100 runs at most.
- Audio, tools other than functions, ``n`` above 1, log probabilities, and references to whole responses are refused
  with a 400 that names the field. Other options change nothing.
- ``temperature``, ``top_p``, the penalties, ``seed`` and ``reasoning_effort`` go to the agent's model with each call of
  the run. A server that refuses one is asked again without it.
- The limit of tokens (``max_tokens``, ``max_completion_tokens``, ``max_output_tokens``) holds for each call of the
  model. An answer that reaches it ends the run as it is, even if it is empty or does not fit a schema. -1 means
  that there is no limit.
- Of an answer that is cut, at the limit of tokens or by the provider's content filter, no call is returned. Its finish
  reason is ``length`` or ``content_filter``, also if the model's server has another word for it. An end with an unknown
  word counts as a cut.
- ``stop`` ends the answer also with a server that does not know it.
- ``functions`` and ``function_call`` are ``tools`` and ``tool_choice`` as they were before; the answer has their shape.
- Functions of the client (``tools``) are offered to the model beside the agent's own tools. Their names must differ
  from the names of the agent's tools. Calls of the agent's tools are made by the agent and not shown. A call of a
  client's function ends the run; the client sends the next request with the conversation and the result. If the model
  calls both kinds at once, only the client's calls are returned and the agent's calls are not made, because nothing
  could carry their results to the next run. The next run also lacks the results of earlier calls of the agent's tools,
  so the model may call them again.
- Thoughts of the model are not sent to the client, so a request with the result of a call cannot bring them back. A
  server that refuses such a request (the thinking modes of DeepSeek and Kimi) gets a blank in their place, so its model
  goes on without them. A server that refuses it in other words cannot be used with functions of the client: 502.
- ``tool_choice`` concerns only the client's functions. ``required`` or a name means that the run ends with a call of a
  function, or of the named function. ``none`` means that no function is offered. The agent's own tools are always
  available. Words and shapes of other APIs are taken (``any``, ``{"type": "tool"}``, a name alone), and functions in
  the form of the other one of these two APIs. If the model violates the choice or the schema of a ``strict`` function,
  it is asked again.
- A format (``response_format``, ``text.format``) is enforced for its run, ``strict`` or not: if an answer does not fit,
  the model is asked again, and if no answer fits, the client gets a 502. A schema replaces the agent's own
  ``output_schema``, because the client knows its own needs. ``json_object`` and ``text`` do not replace it. A schema
  must describe an object, as in the standard. One that is not ``strict`` may be of an older draft of JSON Schema. Of
  its keywords, ``patternProperties`` and dynamic references are left out.
- An answer that must fit a schema or call a function is sent as one piece when it is complete. Nothing is sent before.
- Only text of the agent's steps is shown. A whole answer has the run's reply. A stream also has the text that the model
  wrote before it called a tool, because the call is not known in time: before the reply's text and separated by an
  empty line (completions), or as a separate output item (responses).
- A stream cannot take text back: if the answer does not contain text that was sent, the stream ends with an error.
- If the client disconnects, its run is cancelled, unless the client gave an ``Idempotency-Key`` and can thus fetch the
  answer later.
- Usage that the model did not report is left out. It is not zero.
"""
