"""The server side of a process: HTTP, gRPC, health, problem documents, and the JSON Schema check of bodies."""
