"""The kinds of tools: built in, a tenant's own over HTTP, and tools of MCP servers."""
