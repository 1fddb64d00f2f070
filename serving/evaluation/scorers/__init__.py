"""Scorers of answers, one module each; `load` has their table."""
