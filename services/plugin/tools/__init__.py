"""The kinds of tools: built in, a tenant's own over HTTP, and those of MCP servers."""
