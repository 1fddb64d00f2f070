"""What an answer is worth. Each scorer is one file; `load_scorers` makes those that a spec names."""
