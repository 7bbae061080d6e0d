"""Figures of finished and of running trainings."""
