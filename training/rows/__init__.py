"""Rows of each kind of finetuning: read, rendered and counted in the driver."""
