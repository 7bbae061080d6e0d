"""What is replaced in Megatron and torch; table.py lists it with the reasons."""
