"""User. Owns: tenants, members, API keys. Publishes: TenantCreated, SubjectErased. Serves: gRPC ``Directory`` and
``Keys``; authentication for the gateway."""
