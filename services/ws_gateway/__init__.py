"""Gateway of live streams. Owns: nothing. Handles: agent.events (from its end, in every process),
user.v1.SubjectErased. Serves: HTTP ``/api/v1/runs/{id}/events``, the stream of a posted message, ``/v1/`` in OpenAI's
shapes; WebSocket ``/ws``. Calls: the agent's HTTP, user.v1.Keys.
"""
