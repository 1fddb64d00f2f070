"""What an answer is rewarded for: plain functions `f(answer, row) -> float`, named in the spec; and reward models."""
