"""One layer: its problem, the pruners, and the factorization."""
