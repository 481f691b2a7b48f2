"""Generated from the .proto file beside it; `claw contracts --write` writes it anew."""
