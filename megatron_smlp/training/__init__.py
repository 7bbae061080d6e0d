"""A pretraining run around Megatron's loop: data, step, reporting, signals."""
