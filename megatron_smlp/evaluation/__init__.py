"""Perplexity and zero-shot tasks of a checkpoint, alone and during a training."""
