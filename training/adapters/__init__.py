"""Adapters on a model: attach, load, stack, merge."""
