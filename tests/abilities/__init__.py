"""The abilities of each type of channel: a table of their tests, and the page made from it (docs/conformance.md)."""
