"""What a process serves: HTTP, gRPC, health, problem documents, and the JSON Schema check of bodies."""
