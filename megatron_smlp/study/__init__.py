"""Compare systems: plan the runs, train them with workers, and report verdicts."""
