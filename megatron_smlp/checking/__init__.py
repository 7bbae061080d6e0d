"""`smlp-check FILE`: check that a plugin does what the rest of the program relies on."""
