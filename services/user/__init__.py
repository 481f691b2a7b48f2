"""User. Owns: tenants, members, API keys. Publishes: TenantCreated, SubjectErased, TenantErased. Handles:
TenantDataErased. Serves: gRPC ``Directory`` and ``Keys``; authentication for the gateway."""
