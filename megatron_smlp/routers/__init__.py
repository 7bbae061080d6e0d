"""Routers of tokens and of features; ../systems.py has the table that names them."""
