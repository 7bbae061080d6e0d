"""Checkpoints on disk: names, completeness, checksums, retention, inspection."""
