"""Adapters on a model: attached, exported, taken over. PEFT's where it has them."""
