"""The whole life of a checkpoint: its folder, checksums, records, saving, loading, inspection."""
