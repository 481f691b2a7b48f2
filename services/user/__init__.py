"""User. Owns: tenants, members, API keys. Publishes: TenantCreated, SubjectErased. Serves: Directory, Keys; tells who
calls."""
