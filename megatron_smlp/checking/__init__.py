"""`smlp-check FILE`: whether a plugin does what the rest of the program takes for granted."""
