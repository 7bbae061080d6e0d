"""Turn a command line into checked arguments: parse, fill in, check, then leave unchanged."""
