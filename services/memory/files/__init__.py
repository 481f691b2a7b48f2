"""The parser of files: a process of its own, and the formats that it reads."""
