"""Datasets: from text to token files (prepare/, pairs/, tokenizers/), and how a run reads them."""
