"""Start the ranks of a run on one machine or many, and restart them."""
