"""Checkpoints from and to Hugging Face, upcycled, or rewritten for other layouts."""
