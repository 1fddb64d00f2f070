"""What a run gained and lost: its task, what the base knew before, and fairness, measured before and after."""
