"""A pretraining run: loop, step, data, reporting, signals."""
