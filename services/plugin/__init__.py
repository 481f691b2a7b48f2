"""Plugin. Owns: built-in and registered tools, and the ledger of their calls.

Handles: plugin.v1.PluginChanged, user.v1.SubjectErased. Publishes: plugin.v1.PluginChanged, billing.v1.UsageRecorded,
audit.v1.ActAudited. Serves: HTTP ``/api/v1/plugins`` and ``/api/v1/tools``, gRPC ``Plugin``. Calls: memory's gRPC,
tenants' tools.
"""
