"""Figures of finished and running trainings."""
