"""HTTP calls to the outside world: a client with limits and an SSRF guard, and the signatures of Standard Webhooks."""
