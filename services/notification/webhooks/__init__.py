"""Tenants' webhook endpoints: facts of the platform, posted to an address of the tenant by Standard Webhooks."""
