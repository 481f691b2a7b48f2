"""Generated from the .proto file beside it; `claw contracts --write` generates it again."""
