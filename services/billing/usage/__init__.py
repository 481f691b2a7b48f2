"""Usage records: their verdicts, sums, corrections and reports."""
