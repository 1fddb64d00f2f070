"""How workers share model and optimizer: what DeepSpeed and FSDP2 are told, and what is refused before they start."""
