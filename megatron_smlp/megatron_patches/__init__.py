"""Patches to Megatron and torch; table.py lists them with their reasons."""
