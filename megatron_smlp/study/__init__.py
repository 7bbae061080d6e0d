"""Comparisons of systems: planned, run by workers, told by a report with verdicts."""
