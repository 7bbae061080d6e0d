"""Texts that a checkpoint continues, and the model behind them, which serving shares."""
