"""A published result in small: adapters trained, arms measured, each claim of the paper held against the numbers."""
