"""How the workers of a run share model and optimizer."""

from typing import Literal

from graftwork.config import Spec


class StrategySpec(Spec):
    """No part of a run's identity: every strategy computes the same step."""

    kind: Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"] = "ddp"
    """ddp: a copy a worker. zero1/2/3: DeepSpeed shards optimizer / + gradients / + weights (arXiv 1910.02054). fsdp2:
    torch shards all three, an nf4 base included."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where a GPU's part of the optimizer's state lies; zero1, zero2, zero3; nvme zero3 alone."""
    offload_weights: Literal["none", "cpu", "nvme"] = "none"
    """Where a GPU's part of the weights lies; zero3, and fsdp2 on GPUs (with the optimizer's state, cpu alone)."""
    nvme_path: str | None = None
    """Folder on a fast disk of each machine, where something is offloaded to nvme."""
