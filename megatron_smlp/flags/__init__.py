"""From a command line to checked arguments: parsed, filled in, checked, and kept frozen."""
