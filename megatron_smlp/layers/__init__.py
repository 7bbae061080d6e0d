"""Layers and the specs that build them; ../systems.py has the table that names the mixers."""
