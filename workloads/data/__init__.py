"""Generators and readers of examples. Each draws from its own seeded generator and needs no network."""
