"""User. Owns: tenants, members, API keys. Publishes: TenantCreated, SubjectErased. Serves: Directory, who calls."""
