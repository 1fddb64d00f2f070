"""Several LoRA trials trained at once, in one process on one frozen base: each with its own adapter, optimizer and
schedule, on the same rows."""
