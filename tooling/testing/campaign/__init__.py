"""Campaigns of faults on a whole system under load, judged from outside by invariants: `./claw prove`.

`load` sends messages and keeps the client's ledger. `faults` plans and injects. `collect` reads the system's answers
afterwards. `invariants` compares both: pure functions of the `evidence`. `mutants` removes guards, to see that the
invariants notice. `results` writes RESULTS.md.
"""
